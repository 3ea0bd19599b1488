"""A systemd of its own as process 1, in the network of a host: units really start, and nothing of this machine changes.

Its file system is this machine's under a layer that is thrown away, with what `make install` has put into
build/installed in it; its processes, mounts, host name and control groups are namespaces of their own. What is
installed is pure Python; where the tests run with the packet path compiled, it gets the same.
"""

import os
import secrets
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import conntrackd
from conntrackd.core import compiled
from tests.lab.network import Host, LabError, Process, wait_until

INSTALLED = Path(__file__).parents[2] / "build" / "installed"
UNIT = "conntrackd.service"

# $1: the control group of ours; $2: what is installed; $3: an empty directory; $4: modules that replace those that are
# installed, or nothing. Ends as the systemd.
BOOT = r"""
set -e
base=$3 root=$3/root
mount -t tmpfs -o mode=755 tmpfs "$base"
mkdir "$base/upper" "$base/work" "$root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$base/upper,workdir=$base/work" "$root"
cp -a "$2/." "$root"
[ -z "$4" ] || cp -a "$4/." "$root"/usr/lib/conntrackd/lib/python3*/site-packages
cd "$root"
mount -t proc proc proc
# The kernel's settings are the machine's, but for the network's.
mount --bind proc/sys proc/sys
mount --bind proc/sys/net proc/sys/net
mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
for place in run tmp var/lib/conntrackd dev; do mkdir -p $place && mount -t tmpfs -o mode=755 tmpfs $place; done
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=666 devpts dev/pts
for node in null zero full random urandom tty; do touch dev/$node && mount --bind /dev/$node dev/$node; done
ln -s /proc/self/fd dev/fd; ln -s pts/ptmx dev/ptmx
rm -rf etc/systemd/system
units=etc/systemd/system
mkdir -p $units/conntrackd.service.d $units/system-conntrackd.slice.d
printf '[Unit]\nDescription=Only what is asked for\n' > $units/default.target
printf '[Service]\nWatchdogSec=2s\nStandardError=append:/run/conntrackd.log\n' > $units/conntrackd.service.d/lab.conf
mkdir old
pivot_root . old
umount -l old
systemd-sysusers conntrackd.conf
exec env -i container=lab PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --show-status=no --log-target=null
"""

# $0: the network namespace; $1: BOOT; then its arguments.
ENTER = """
boot=$1; shift
echo $$ > "$1/cgroup.procs"
exec nsenter --net="/run/netns/$0" unshare --mount --pid --uts --ipc --cgroup --fork sh -c "$boot" sh "$@"
"""


class Machine:
    """The machine; use `machine()`."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._pid = int(wait_until(self._child, "the systemd begins")[0])

    def _child(self) -> list[str]:
        if not self._process.running:
            raise LabError(f"the systemd ended: {self._process.output()}")
        return Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command as root inside. With `check`, LabError with its output when it fails."""
        inside = ["nsenter", "-t", str(self._pid), "-a", "-r", "-w", *command]
        done = subprocess.run(inside, capture_output=True, text=True, timeout=60, check=False)
        if check and done.returncode:
            raise LabError(f"{' '.join(command)} failed ({done.returncode}): {done.stdout}{done.stderr}{self.log()}")
        return done

    def systemctl(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`systemctl WORDS conntrackd.service`."""
        return self.run("systemctl", *words, UNIT, check=check)

    def show(self, name: str) -> str:
        """One property of the unit."""
        return self.systemctl("show", "--value", "-p", name).stdout.strip()

    def write(self, path: str, text: str) -> None:
        """Replace a file inside."""
        Path(f"/proc/{self._pid}/root{path}").write_text(text)

    def log(self) -> str:
        """What the service has written to stderr."""
        log = Path(f"/proc/{self._pid}/root/run/conntrackd.log")
        return log.read_text() if log.exists() else ""

    def is_up(self) -> bool:
        """Whether its systemd answers."""
        self._child()
        return self.run("systemctl", "is-active", "default.target", check=False).returncode == 0


@contextmanager
def machine(host: Host, directory: Path) -> Iterator[Machine]:
    """Boot it, and take it down whatever happens. `directory` is empty, and is so again."""
    groups = control_groups()
    assert groups is not None
    group = groups / f"ct-{secrets.token_hex(3)}"
    group.mkdir()
    modules = str(Path(conntrackd.__file__).parents[1]) if compiled() else ""
    # Not through `ip netns exec`, which hides the control groups.
    arguments = [str(group), str(INSTALLED), str(directory), modules]
    process = Process(["sh", "-c", ENTER, host.netns, BOOT, *arguments], os.environ)
    try:
        made = Machine(process)
        wait_until(made.is_up, "the systemd is up", 30.0)
        yield made
    finally:
        (group / "cgroup.kill").write_text("1")
        process.close()
        wait_until(lambda: "populated 0" in (group / "cgroup.events").read_text(), "all its processes have ended")
        for below in sorted(group.rglob("*/"), reverse=True):
            below.rmdir()
        group.rmdir()


def control_groups() -> Path | None:
    """Find where control groups (version 2) may be made."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, place, kind, options, *_ = line.split()
        if kind == "cgroup2" and options.startswith("rw"):
            return Path(place)
    return None
