"""Real servers for the lab: Debian's, unpacked by `make servers` and not installed, for installing starts them."""

from pathlib import Path

from tests.lab.network import Host, LabError, Process, wait_until

UNPACKED = Path(__file__).resolve().parents[2] / "build" / "servers"


def program(path: str) -> Path:
    """The program of an unpacked package; LabError if it is not there."""
    found = UNPACKED / path
    if not found.exists():
        raise LabError(f"{found} is missing: `make servers` unpacks it")
    return found


def _wait_for_port(host: Host, table: str, port: int, process: Process) -> None:
    """Return once a socket of the host is bound to the port."""

    def bound() -> bool:
        if not process.running:
            raise LabError(f"{process.argv} ended: {process.output()}")
        return any(f":{port:04X} " in host.read(f"net/{each}") for each in (table, table + "6"))

    wait_until(bound, f"{process.argv} listens on port {port}")


def ftp_server(host: Host, directory: Path, port: int) -> Process:
    """vsftpd for anonymous users, with files of `directory`/files; over both families."""
    files, empty = directory / "files", directory / "empty"
    empty.mkdir(exist_ok=True)
    # The server gives its privileges up, so its user must be able to go there.
    for each in (directory, files, empty):
        each.chmod(0o755)
    config = directory / f"vsftpd-{port}.conf"
    settings = {
        "listen_ipv6": "YES",
        "listen_port": port,
        "background": "NO",
        "anonymous_enable": "YES",
        "no_anon_password": "YES",
        "anon_root": files,
        "ftp_username": "daemon",  # of those that every Debian has, one with a home
        "nopriv_user": "nobody",
        "secure_chroot_dir": empty,
        "connect_from_port_20": "YES",
        "seccomp_sandbox": "NO",
        "isolate": "NO",
        "isolate_network": "NO",
    }
    config.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    process = host.start(program("usr/sbin/vsftpd"), config)
    _wait_for_port(host, "tcp", port, process)
    return process


def tftp_server(host: Host, directory: Path, family: int) -> Process:
    """tftpd-hpa, for reading and writing in `directory`."""
    directory.chmod(0o777)
    process = host.start(
        program("usr/sbin/in.tftpd"),
        "--foreground",
        f"-{family}",
        "--secure",
        "--create",
        "--user",
        "nobody",
        directory,
    )
    _wait_for_port(host, "udp", 69, process)
    return process
