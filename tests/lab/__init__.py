"""The lab: networks of namespaces with a real daemon in the middle, for demo, tests and benchmarks."""
