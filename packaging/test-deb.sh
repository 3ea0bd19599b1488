#!/bin/sh
# Installs, runs, upgrades, removes and purges the package in a Debian of its own: test-deb.sh PACKAGE ROOT, where ROOT is
# what debootstrap made. It is left as it is: everything happens in a layer above it, in namespaces of its own.
set -eu
if [ "${IN_NAMESPACES:-}" != 1 ]; then
    IN_NAMESPACES=1 exec unshare --mount --net --pid --uts --ipc --fork --kill-child "$0" "$@"
fi
package=$1 lower=$2
work=$(mktemp -d)
trap 'umount -R "$work"; rmdir "$work"' EXIT
mount -t tmpfs tmpfs "$work"
mkdir "$work/upper" "$work/work" "$work/root"
mount -t overlay overlay -o "lowerdir=$lower,upperdir=$work/upper,workdir=$work/work" "$work/root"
root=$work/root
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
ip link set lo up

say() { echo "== $*"; }
fail() { echo "FAILED: $*" >&2; exit 1; }
inside() { chroot "$root" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive "$@"; }
ours() { inside iptables-legacy-save | grep -c CONNTRACKD || true; }

pid() { inside conntrackd status -o json | sed -n 's/.*"pid": \([0-9]*\).*/\1/p'; }

begin() { # start the daemon
    inside conntrackd run & # its process is the one that ends with the namespace at the latest
    tries=0
    until inside conntrackd status >/dev/null 2>&1; do
        tries=$((tries + 1)) && [ "$tries" -lt 300 ] || fail "the daemon does not answer"
        sleep 0.1
    done
    inside conntrackd status | head -1
    until [ "$(ours)" -gt 0 ]; do sleep 0.1; done
}

end() { # stop it
    kill -TERM "$(pid)"
    wait $! || fail "the daemon did not stop in order"
}

say "install"
cp "$package" "$root/tmp/first.deb"
inside dpkg -i /tmp/first.deb
inside conntrackd --version | grep compiled || fail "not compiled"
inside conntrackd check /etc/conntrackd/conntrackd.toml
inside getent passwd conntrackd
[ ! -e "$root/etc/systemd/system/multi-user.target.wants/conntrackd.service" ] || fail "enabled without being asked"
begin
end

say "upgrade: what the operator wrote stays"
echo "# mine" >> "$root/etc/conntrackd/conntrackd.toml"
dpkg-deb -R "$package" "$work/next"
sed -i 's/^Version: .*/&+next/' "$work/next/DEBIAN/control"
dpkg-deb -b "$work/next" "$root/tmp/next.deb" >/dev/null
begin
runs=$(pid)
inside dpkg -i --force-confold /tmp/next.deb
grep -q "# mine" "$root/etc/conntrackd/conntrackd.toml" || fail "the configuration was replaced"

say "upgrade: the daemon that runs is not stopped, and goes on as the new program when it is restarted"
[ "$(pid)" = "$runs" ] && [ "$(ours)" -gt 0 ] || fail "it was stopped, or its rules removed"
inside conntrackd restart
inside conntrackd status | head -1
[ "$(pid)" = "$runs" ] || fail "another process runs"
end

say "remove: the rules go, the configuration stays"
[ "$(ours)" -gt 0 ] || fail "there were no rules to remove"
inside dpkg -r conntrackd-firewall
[ "$(ours)" -eq 0 ] || fail "rules are left: nothing would pass"
[ -e "$root/etc/conntrackd/conntrackd.toml" ] || fail "the configuration is gone"

say "purge: nothing is left"
inside dpkg -P conntrackd-firewall
left=$(find "$root" -xdev -path "$root/proc" -prune -o -path "$root/tmp" -prune -o -path "$root/var/log" -prune -o -path "$root/run" -prune -o \
    -name '*conntrackd*' -print)
[ -z "$left" ] || fail "left: $left"
say "all is well"
