#!/bin/sh
# Installs Stasis on the node whose root is at /host, removes what it installed, or runs
# stasisd there. It runs in the pods of stasis.yaml, remove/stasis-remove.yaml and
# stasisd/stasisd.yaml.
set -eu

here=/stasis
host=/host
bin=/usr/local/bin
dropin=/etc/containerd/conf.d/stasis.toml
# What was made on the node, a path a line, in that order; and whether containerd
# has to be restarted for it.
record=/usr/local/share/stasis/installed
pending=/usr/local/share/stasis/pending

say() { echo "stasis: $*"; }
die() {
	say "error: $*" >&2
	exit 1
}

# on_node CMD...: runs a program of the node. systemctl would refuse to work below
# another root.
node_path=/usr/local/sbin:$bin:/usr/sbin:/usr/bin:/sbin:/bin
on_node() { SYSTEMD_IGNORE_CHROOT=1 PATH=$node_path chroot "$host" "$@"; }

# ours PATH: was it made by us?
ours() { grep -qxF "$1" "$host$record" 2>/dev/null; }

# folder PATH: makes a folder, and those above it.
folder() {
	[ ! -d "$host$1" ] || return 0
	folder "${1%/*}"
	mkdir "$host$1"
	made="$made$1
"
}

# place FILE PATH MODE [later]: copies a file to the node. Never is there half of one,
# and what runs goes on with the old one. With "later" containerd need not be restarted.
place() {
	if cmp -s "$1" "$host$2"; then return; fi
	[ ! -e "$host$2" ] || ours "$2" || die "$2 is on the node already, and was not put there by this installer: remove it first"
	made=
	folder "${2%/*}"
	ours "$2" || made="$made$2
"
	# Noted first: what is noted and not there does no harm.
	printf %s "$made" >>"$host$record"
	[ "${4-}" = later ] || : >"$host$pending"
	(umask 077 && cp "$1" "$host$2.new")
	chmod "$3" "$host$2.new"
	mv "$host$2.new" "$host$2"
	say "installed $2"
}

# keys: the Secret's, if there is one. A key that the node has made itself is not
# replaced: what it has signed would not be trusted any more.
keys() {
	if [ -e /keys/sign.key ]; then
		if [ -e "$host/etc/stasis/keys/sign.key" ] && ! ours /etc/stasis/keys/sign.key; then
			say "warning: the node has a key of its own, which stays; remove /etc/stasis/keys/sign.key for the cluster's"
		else
			place /keys/sign.key /etc/stasis/keys/sign.key 0600 later
		fi
	fi
	for key in /keys/*.pub; do
		[ -e "$key" ] || continue
		place "$key" "/etc/stasis/trusted/${key##*/}" 0644 later
	done
}

restart() {
	say "restarting containerd; containers go on"
	on_node systemctl restart containerd
}

# answers: waits until containerd serves again.
answers() {
	i=0
	until on_node stasis ls >/dev/null 2>&1; do
		i=$((i + 1))
		[ $i -lt 60 ] || die "containerd does not answer: $(on_node stasis ls 2>&1)"
		sleep 1
	done
}

install() {
	made=
	folder "${record%/*}"
	printf %s "$made" >>"$host$record"
	place "$here/containerd-shim-stasis-v1" $bin/containerd-shim-stasis-v1 0755
	place "$here/stasis" $bin/stasis 0755
	place "$here/stasisd" $bin/stasisd 0755 later
	keys
	case $(on_node containerd --version) in
	*' v1.'* | *' 1.'*) cp "$here/stasis-1.7.toml" /tmp/stasis.toml ;;
	*) cp "$here/stasis.toml" /tmp/stasis.toml ;;
	esac
	# The kubelet's cgroups are systemd's, or not, for all runtimes.
	if on_node containerd config dump | grep -q 'SystemdCgroup = true'; then
		sed -n 's/^\(\[.*\.runtimes\.stasis\)\]$/\n\1.options]\n  SystemdCgroup = true/p' /tmp/stasis.toml >/tmp/options
		cat /tmp/options >>/tmp/stasis.toml
	fi
	place /tmp/stasis.toml $dropin 0644
	if ! on_node containerd config dump | grep -q 'runtimes\.stasis\]'; then
		# Nor shall it stumble over it, whenever it is restarted.
		rm "$host$dropin"
		die "containerd does not read $dropin: add imports = ['/etc/containerd/conf.d/*.toml'] to the top of /etc/containerd/config.toml"
	fi
	if [ -e "$host$pending" ]; then
		restart
		rm "$host$pending"
	fi
	answers
	on_node stasis check || die "this node cannot checkpoint and restore: see above for what is missing"
}

# users: the containers that run under Stasis. containerd notes the shim of each.
users() {
	for note in "$host"/run/containerd/io.containerd.runtime.v2.task/*/*/shim-binary-path; do
		if grep -qs containerd-shim-stasis-v1 "$note"; then
			note=${note%/*}
			echo "${note##*/}"
		fi
	done
}

remove() {
	if [ ! -e "$host$record" ]; then
		say "nothing of this installer's is on the node"
		return
	fi
	# Without its shim a container could not be stopped in good order.
	while [ -n "$(users)" ]; do
		say "waiting for containers that run under Stasis: $(users | tr '\n' ' ')"
		sleep 2
	done
	made=$(sed '1!G;h;$!d' "$host$record")
	for path in $made; do
		[ ! -d "$host$path" ] || continue
		rm -f "$host$path"
		say "removed $path"
	done
	restart
	# Last of all, so that whatever interrupts us is not the end of it.
	rm -f "$host$pending" "$host$record"
	for path in $made; do
		# Others may have put something there.
		[ ! -d "$host$path" ] || rmdir "$host$path" || true
	done
}

# serve: becomes stasisd, on the node.
serve() {
	until ours $bin/stasisd && [ -x "$host$bin/stasisd" ]; do
		say "waiting for the installer"
		sleep 2
	done
	config=/run/stasisd-config/stasisd.toml
	[ -e "$host$config" ] || config=/etc/stasis/stasisd.toml
	[ ! -e "$host$config" ] || set -- --config $config
	PATH=$node_path exec chroot "$host" $bin/stasisd "$@"
}

# served: does it answer?
served() { on_node stasis --host unix:///run/stasis/stasisd.sock ls; }

case ${1-} in
install | remove) "$1" ;;
serve | served)
	command=$1
	shift
	"$command" "$@"
	exit
	;;
*) die "usage: node.sh install|remove|serve|served" ;;
esac
say "done"
: >/tmp/done
# The pod stays, or there would be another one.
trap 'exit 0' TERM INT
sleep infinity &
wait
