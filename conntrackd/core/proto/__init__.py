"""One file per protocol, named as in the kernel (nf_conntrack_proto_tcp.c -> tcp.py)."""
