#!/usr/bin/env bash
# Run a command in the folder of an image as a container of compose or Kubernetes would run it, without a container engine:
# own PID, mount, IPC and network namespaces, a root that cannot be written, uid 1000 without capabilities or new privileges.
#   confined.sh ROOT TMP_SIZE [--bind SOURCE TARGET ro|rw]... -- VAR=VALUE... COMMAND ARGUMENTS...
# TMP_SIZE: of the memory file system at /tmp, as 16m. /dev holds six nodes bound from the host's; the host's /dev is not touched.
# Needs root, util-linux, coreutils and python3. The command is the only child of the process that this script becomes.
set -euo pipefail
if [ "${1:-}" != --inside ]; then
  exec unshare --mount --pid --ipc --net --fork --kill-child -- "$0" --inside "$@"
fi
shift
root=$1 tmp_size=$2
shift 2
mount --bind "$root" "$root"
mount -t proc -o nosuid,nodev,noexec proc "$root/proc"
mount -t tmpfs -o "nosuid,nodev,mode=1777,size=$tmp_size" tmpfs "$root/tmp"
mount -t tmpfs -o nosuid,mode=0755,size=64k tmpfs "$root/dev"
for node in null zero full random urandom tty; do
  touch "$root/dev/$node"
  mount --bind "/dev/$node" "$root/dev/$node"
done
ln -s /proc/self/fd "$root/dev/fd"
mkdir "$root/dev/shm"
mount -t tmpfs -o nosuid,nodev,noexec,mode=1777,size=64m tmpfs "$root/dev/shm"
while [ "$1" = --bind ]; do
  mount --bind "$2" "$root$3"
  mount -o "remount,bind,nosuid,nodev,$4" "$root$3"
  shift 4
done
[ "$1" = -- ] && shift
mount -o remount,bind,ro,nosuid "$root"
# Loopback is down in a new network namespace: SIOCSIFFLAGS (0x8914) with IFF_UP | IFF_RUNNING.
python3 -c 'import fcntl, socket, struct
fcntl.ioctl(socket.socket(socket.AF_INET, socket.SOCK_DGRAM), 0x8914, struct.pack("16sh14x", b"lo", 0x41))'
# The command becomes PID 1 of the namespace, as in a container.
exec setpriv --no-new-privs --inh-caps=-all chroot --userspec=1000:1000 --groups=1000 "$root" env --ignore-environment "$@"
