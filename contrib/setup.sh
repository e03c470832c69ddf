#!/usr/bin/env bash
#
# Installs what Stasis's demo, tests and benchmarks run on: containerd, runc,
# crun, CRIU, the tools of others that Stasis exchanges checkpoints with, and root
# filesystems to put into containers; with --kubernetes also Kubernetes itself.
#
# It installs a few missing Debian packages on the host; everything else goes
# into a cache folder and touches nothing outside it. What the host already has
# is used where it works. Packages of a newer Debian are unpacked privately,
# never installed: the host's libc and its package database stay as they are.
#
# The cache ($STASIS_CACHE, else ~/.cache/stasis):
#   bin/               containerd, ctr, containerd-shim-runc-v2, runc, crun, criu,
#                      podman, checkpointctl, docker-registry, mkfs.btrfs,
#                      mkfs.erofs
#   containerd-1.7/, containerd-2.1/
#                      the same containerd programs of older releases
#   private/           Debian trees behind what is in bin/
#   rootfs/            busybox, redis, python, nginx, java, node
#   kubernetes/bin/    kube-apiserver, kube-controller-manager, kube-scheduler,
#                      kubelet; etcd and kubectl are in bin/
#   stamps/            what each of the above was made from
#
# Every component is made in a temporary folder and renamed into place, and its
# stamp is written last: a component whose stamp is missing or says something
# else is made again.

# shellcheck disable=SC2016 # apt, bash -c and eval expand what stands in single quotes
# shellcheck source=/dev/null

set -euo pipefail
shopt -s inherit_errexit nullglob

usage() {
	cat <<'USAGE'
usage: contrib/setup.sh            install what is missing (as root)
       contrib/setup.sh --check    install nothing; say what is missing
       contrib/setup.sh --vm       install what `make test-vm` needs, and only that
       contrib/setup.sh --env      print export lines for a shell to eval
       contrib/setup.sh --kubernetes [--check]
                                   the same, with what a cluster is made of
USAGE
}

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cache=${STASIS_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/stasis}
case $cache in /*) ;; *) cache=$PWD/$cache ;; esac

# The Debian release that criu and crun are taken from where the host's own do
# not do, and that the older containerd, Podman, checkpointctl and the registry
# always are, so that tests meet the same versions everywhere; and the release
# after it, for criu on kernels that are too new for the first, and for a
# containerd between the two.
newer=trixie
newest=forky
runc_version=v1.5.2

components=(criu runc busybox containerd redis python nginx java node crun containerd17 containerd21 podman tools)

# What only the tests on a cluster need: a quarter of an hour to build, and half
# a gigabyte.
kubernetes_components=(kubernetes cluster)

# Filled in by main: a scratch folder inside the cache, gone at exit.
tmp=
# The command that run waits for.
child=

say() { printf 'setup: %s\n' "$*"; }
die() {
	printf 'setup: error: %s\n' "$*" >&2
	exit 1
}

# run CMD...: keeps an external command's output to itself unless it fails. It
# runs in the background, or a signal to us would wait for it.
run() {
	"$@" >"$tmp/log" 2>&1 </dev/null &
	child=$!
	if ! wait "$child"; then
		tail -n 30 "$tmp/log" >&2
		die "failed: $*"
	fi
	child=
}

quote() { printf "'%s'" "${1//\'/\'\\\'\'}"; }

# host_cmd NAME: the path of the host's own NAME; never one out of a cache that
# this script made, which may well be first in PATH.
host_cmd() {
	local dirs dir
	IFS=: read -ra dirs <<<"$PATH:/usr/local/sbin:/usr/sbin:/sbin"
	for dir in "${dirs[@]}"; do
		[[ $dir == /* && ! -d $dir/../stamps && -f $dir/$1 && -x $dir/$1 ]] || continue
		printf '%s\n' "$dir/$1"
		return
	done
	return 1
}

# first_line CMD...: the first line a command prints, which is where they all
# print their version.
first_line() {
	local out
	out=$("$@" 2>/dev/null) || true
	printf '%s\n' "${out%%$'\n'*}"
}

# --- the host's Debian packages ----------------------------------------------

# have PACKAGE: does the host have what we need PACKAGE for, from wherever?
have() {
	case $1 in
	gcc) command -v gcc >/dev/null ;;
	libc6-dev) [[ -e /usr/include/stdio.h ]] ;;
	pkg-config) command -v pkg-config >/dev/null ;;
	libseccomp-dev) command -v pkg-config >/dev/null && pkg-config --exists libseccomp ;;
	iproute2) host_cmd ip >/dev/null ;;
	iptables) host_cmd iptables >/dev/null ;;
	containernetworking-plugins) [[ -x /usr/lib/cni/bridge ]] ;;
	*) die "have: no test for $1" ;;
	esac
}
packages=(gcc libc6-dev pkg-config libseccomp-dev iproute2 iptables containernetworking-plugins)

missing_packages() {
	local p
	for p in "${packages[@]}"; do
		have "$p" || printf '%s\n' "$p"
	done
}

install_packages() {
	local missing
	mapfile -t missing < <(missing_packages)
	((${#missing[@]})) || return 0
	say "packages: installing ${missing[*]} with apt-get"
	run apt-get -q update
	run env DEBIAN_FRONTEND=noninteractive apt-get -q -y install --no-install-recommends "${missing[@]}"
	mapfile -t missing < <(missing_packages)
	((${#missing[@]} == 0)) || die "apt-get succeeded, yet these are still missing: ${missing[*]}"
}

# --- packages of Debian, unpacked privately ----------------------------------

host_codename=$(. /etc/os-release 2>/dev/null && printf '%s' "${VERSION_CODENAME-}") || true

# debian_archive: sets uri, keyring and host_suite from the host's own entry for
# the Debian archive. apt itself reads its sources, so both formats will do.
debian_archive() {
	[[ -z ${uri-} ]] || return 0
	local id u release component origin label entry separator
	while IFS='|' read -r id u release component origin label entry; do
		# Origin and label are known only once apt-get update has run.
		[[ $id == Packages && $component == main ]] || continue
		[[ ${origin:-Debian} == Debian && ${label:-Debian} == Debian ]] || continue
		case $release in
		"$host_codename" | oldoldstable | oldstable | stable | testing | unstable | sid) ;;
		*) continue ;;
		esac
		uri=$u host_suite=$release
		# The keyring that entry names, if it names one. An entry is a
		# paragraph of a .sources file, or a line of a .list file.
		separator=$'\n'
		[[ $entry != *.sources:* ]] || separator=
		keyring=$(awk -v RS="$separator" -v uri="${u%/}" '
			index($0, uri) && match($0, /[Ss]igned-[Bb]y[:=][ \t]*\/[^], \t\n]+/) {
				s = substr($0, RSTART, RLENGTH); sub(/^[^\/]*/, "", s); print s; exit
			}' "${entry%:*}")
		if [[ -z $keyring && -r /usr/share/keyrings/debian-archive-keyring.gpg ]]; then
			keyring=/usr/share/keyrings/debian-archive-keyring.gpg
		fi
		return 0
	done < <(apt-get indextargets --format \
		'$(IDENTIFIER)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)|$(ORIGIN)|$(LABEL)|$(SOURCESENTRY)')
	die "no entry for the Debian archive (component main) among apt's sources in /etc/apt"
}

# apt_private SUITE: sets apt, a command line of an apt that knows that one
# suite, believes that nothing is installed, and keeps its state in $tmp.
# Signatures are checked as ever; only the pins and sources of the host are out
# of the way. _apt cannot enter a cache below /root, hence the sandbox user.
apt_private() {
	local suite=$1 state=$tmp/apt-$1
	apt=(apt-get -q -y
		-o Dir::Etc::sourcelist="$state/sources.list" -o Dir::Etc::sourceparts=/dev/null
		-o Dir::Etc::preferences=/dev/null -o Dir::Etc::preferencesparts=/dev/null
		-o Dir::State="$state" -o Dir::State::lists="$state/lists" -o Dir::State::status=/dev/null
		-o Dir::Cache="$state/cache" -o APT::Sandbox::User=root
		-o APT::Install-Recommends=false -o Acquire::Retries=3)
	[[ ! -e $state ]] || return 0
	debian_archive
	mkdir -p "$state/lists/partial" "$state/cache/archives/partial"
	printf 'deb [arch=%s target=Packages%s] %s %s main\n' "$(dpkg --print-architecture)" \
		"${keyring:+ signed-by=$keyring}" "$uri" "$suite" >"$state/sources.list"
	run "${apt[@]}" update
	# apt takes a suite that it could not fetch for a warning.
	[[ $("${apt[@]}" indextargets --format '$(ORIGIN)' 'Identifier: Packages') == Debian ]] ||
		die "$(tail -n 5 "$tmp/log")"$'\n'"cannot fetch Debian's $suite from $uri, or it is not Debian's"
}

# unpack SUITE TREE SKIP PACKAGE...: unpacks packages with all they depend on
# into TREE, without the ones whose names match the regular expression SKIP.
# Maintainer scripts do not run, so SKIP may name what only they need.
# note is set to the version of the first package.
unpack() {
	local suite=$1 tree=$2 skip=$3 deb name d
	shift 3
	apt_private "$suite"
	mkdir -p "$tree.debs/partial" "$tree"/usr/{bin,sbin,lib,lib64}
	for d in bin sbin lib lib64; do ln -s "usr/$d" "$tree/$d"; done
	run "${apt[@]}" -o Dir::Cache::archives="$tree.debs" install --download-only "$@"
	for deb in "$tree.debs"/*.deb; do
		name=${deb##*/} name=${name%%_*}
		if [[ $name == "$1" ]]; then note=$(dpkg-deb --field "$deb" Version); fi
		if [[ $name =~ ^($skip)$ ]]; then continue; fi
		dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$tree" --keep-directory-symlink \
			--exclude='./usr/share/doc' --exclude='./usr/share/man' --exclude='./usr/share/locale' \
			--exclude='./usr/share/info' --exclude='./usr/share/lintian' --exclude='./usr/share/bug' \
			--exclude='./usr/share/bash-completion' --exclude='./usr/share/gdb' --exclude='./usr/lib/*/gconv' \
			--exclude='./usr/lib/systemd' --exclude='./lib/systemd' --exclude='./etc/init.d'
	done
	rm -rf "$tree.debs"
}

# wrap TREE PROGRAM FILE: writes FILE, which runs PROGRAM of a tree that will be
# TREE, with that tree's own loader and libraries. What PROGRAM runs in its turn
# is not affected, and it needs nothing of the environment.
wrap() {
	local tree=$1 program=$2 file=$3 loader loaders
	loaders=("$tmp/tree"/usr/lib/*/ld-linux*.so.*)
	((${#loaders[@]} == 1)) || die "no dynamic loader in the packages of $program"
	loader=$tree${loaders[0]#"$tmp/tree"}
	cat >"$file" <<-WRAPPER
		#!/bin/sh
		exec $(quote "$loader") --library-path $(quote "${loader%/*}") $(quote "$tree/$program") "\$@"
	WRAPPER
	chmod 0755 "$file"
}

# place NEW OLD: puts the file or folder NEW where OLD is.
place() {
	mkdir -p "${2%/*}"
	if [[ -d $2 && ! -L $2 ]]; then mv -T "$2" "$(mktemp -d "$tmp/old.XXXX")/old"; fi
	mv -fT "$1" "$2"
}

link() {
	ln -s "$1" "$tmp/link"
	place "$tmp/link" "$2"
}

# --- components --------------------------------------------------------------
#
# For each: want_X prints what it is to be made from, ok_X says in a moment
# whether it is there and works, make_X makes it and may set note, a word on the
# outcome for the summary. A stamp holds the three: what from, the note, the recipe.

# criu_works CRIU: can it dump and restore a process with an inet socket, here?
# It takes a third of a second, and nothing less tells: criu 4.1 passes its own
# `criu check` on Linux 6.16 and later, but cannot dump any inet socket there.
criu_works() (
	dir=$(mktemp -d ${tmp:+-p "$tmp"}) pid=
	trap '[[ -z $pid ]] || kill -9 "$pid"; rm -rf "$dir"' EXIT
	exec >"${tmp:-$dir}/criu.log" 2>&1 </dev/null
	"$1" check || exit 1
	# Descriptors of whoever runs us must not be in the dump.
	setsid bash -c 'cd /
		for fd in /proc/$$/fd/*; do ((${fd##*/} < 3)) || eval "exec ${fd##*/}>&-"; done
		exec 3<>/dev/udp/127.0.0.1/9; exec sleep 60' >/dev/null 2>&1 &
	pid=$!
	until [[ $(<"/proc/$pid/comm") == sleep ]]; do sleep 0.01; done
	"$1" dump --tree "$pid" --images-dir "$dir" || exit 1
	wait "$pid" || true
	"$1" restore --restore-detached --images-dir "$dir"
)

want_criu() {
	local host
	if host=$(host_cmd criu) && criu_works "$host"; then
		printf 'the host: %s\n' "$host"
	else
		printf 'Debian, in %s\n' "$cache"
	fi
}
ok_criu() { criu_works "$cache/bin/criu"; }
make_criu() {
	local host suite why
	if [[ $want == 'the host: '* ]]; then
		say "criu: using the host's ${want#the host: }"
		link "${want#the host: }" "$cache/bin/criu"
		return
	fi
	why='host has none'
	if host=$(host_cmd criu); then
		why="host's $(first_line "$host" --version | sed 's/.* //') does not work on this kernel"
	fi
	for suite in "$newer" "$newest"; do
		say "criu: $why; fetching Debian $suite's privately"
		rm -rf "$tmp/tree"
		unpack "$suite" "$tmp/tree" '' criu
		wrap "$tmp/tree" usr/sbin/criu "$tmp/criu"
		if ! criu_works "$tmp/criu"; then
			why="$suite's $note does not work on this kernel"
			continue
		fi
		wrap "$cache/private/criu" usr/sbin/criu "$tmp/criu"
		place "$tmp/tree" "$cache/private/criu"
		place "$tmp/criu" "$cache/bin/criu"
		note="$suite's $note"
		return
	done
	grep -i error "$tmp/criu.log" >&2 || true
	die "criu: $why either, or this machine does not allow checkpoints at all"
}

# A host's crun must be built with CRIU, and load libcriu, which is only a
# Recommends of the package.
host_crun() {
	local host out
	host=$(host_cmd crun) || return 1
	[[ $("$host" --version 2>/dev/null) == *+CRIU* ]] || return 1
	out=$(LD_PRELOAD=libcriu.so.2 /bin/true 2>&1) || return 1
	[[ -z $out ]] || return 1
	printf '%s\n' "$host"
}
want_crun() {
	local host
	if host=$(host_crun); then
		printf 'the host: %s\n' "$host"
	else
		printf 'Debian %s in %s\n' "$newer" "$cache"
	fi
}
ok_crun() {
	local out
	out=$("$cache/bin/crun" --version 2>/dev/null) && [[ $out == *+CRIU* ]]
}
make_crun() {
	if [[ $want == 'the host: '* ]]; then
		say "crun: using the host's ${want#the host: }"
		link "${want#the host: }" "$cache/bin/crun"
		return
	fi
	if host_cmd crun >/dev/null; then
		say "crun: host's cannot checkpoint (no +CRIU, or no libcriu2); fetching Debian $newer's privately"
	else
		say "crun: host has none; fetching Debian $newer's privately"
	fi
	unpack "$newer" "$tmp/tree" criu crun libcriu2
	[[ -n $(echo "$tmp/tree"/usr/lib/*/libcriu.so.2) ]] || die "no libcriu.so.2 in Debian $newer's libcriu2"
	wrap "$cache/private/crun" usr/bin/crun "$tmp/crun"
	place "$tmp/tree" "$cache/private/crun"
	place "$tmp/crun" "$cache/bin/crun"
}

# 1.1 is the first with `runc features`.
want_runc() {
	local host features
	if host=$(host_cmd runc) && features=$("$host" features 2>/dev/null) &&
		[[ $features =~ \"org.opencontainers.runc.checkpoint.enabled\":\ *\"true\" ]]; then
		printf 'the host: %s\n' "$host"
	else
		printf 'source, %s\n' "$runc_version"
	fi
}
ok_runc() { "$cache/bin/runc" --version >/dev/null 2>&1; }
make_runc() {
	if [[ $want == 'the host: '* ]]; then
		say "runc: using the host's ${want#the host: }"
		link "${want#the host: }" "$cache/bin/runc"
		return
	fi
	say "runc: building $runc_version (half a minute)"
	build github.com/opencontainers/runc "$runc_version" pie 'seccomp urfave_cli_no_docs' \
		'-X main.gitCommit=%s' .
	place "$tmp/gobin/runc" "$cache/bin/runc"
}

# containerd_version: the version that this repository's go.mod builds against.
containerd_version() { (cd "$repo" && go list -m -f '{{.Version}}' github.com/containerd/containerd/v2); }

want_containerd() {
	local version
	version=$(containerd_version) && printf 'source, %s\n' "$version"
}
ok_containerd() {
	[[ -x $cache/bin/containerd && -x $cache/bin/ctr && -x $cache/bin/containerd-shim-runc-v2 ]]
}
make_containerd() {
	local module=github.com/containerd/containerd/v2 version=${want#source, } p
	say "containerd: building $version (about 4 minutes on 2 cores with an empty Go cache, else seconds)"
	# As upstream's Makefile does, less the snapshotters that nobody needs here;
	# upstream's shim is static.
	local ld="-X $module/version.Version=$version -X $module/version.Revision=%s -X $module/version.Package=$module"
	build $module "$version" pie 'urfave_cli_no_docs no_btrfs no_devmapper no_zfs' "$ld" ./cmd/containerd ./cmd/ctr
	CGO_ENABLED=0 build $module "$version" exe 'urfave_cli_no_docs no_grpc' "$ld" ./cmd/containerd-shim-runc-v2
	for p in containerd ctr containerd-shim-runc-v2; do
		place "$tmp/gobin/$p" "$cache/bin/$p"
	done
}

# build MODULE VERSION BUILDMODE TAGS LDFLAGS PACKAGE...: builds programs out of the
# module proxy, with the dependencies that their own go.mod pins, into
# $tmp/gobin. %s in LDFLAGS stands for the commit, where the proxy knows it.
build() {
	local module=$1 version=$2 mode=$3 tags=$4 ldflags=$5 commit
	shift 5
	set -- "${@/#./$module}"
	run go mod download -json "$module@$version"
	commit=$(sed -n 's/.*"Hash": *"\([0-9a-f]*\)".*/\1/p' "$tmp/log")
	ldflags=${ldflags//%s/$commit}
	GOBIN=$tmp/gobin run go install -trimpath -buildmode="$mode" -tags "$tags" -ldflags "-s -w $ldflags" \
		"${@/%/@$version}"
}

want_containerd17() { printf 'Debian %s\n' "$newer"; }
ok_containerd17() { [[ -x $cache/containerd-1.7/bin/containerd-shim-runc-v2 ]]; }
make_containerd17() { debian_containerd 1.7 "$newer"; }

want_containerd21() { printf 'Debian %s\n' "$newest"; }
ok_containerd21() { [[ -x $cache/containerd-2.1/bin/containerd-shim-runc-v2 ]]; }
make_containerd21() { debian_containerd 2.1 "$newest"; }

# debian_containerd RELEASE SUITE: a suite's containerd, as it is: its programs
# do with an older libc.
debian_containerd() {
	say "containerd-$1: fetching Debian $2's privately"
	unpack "$2" "$tmp/tree" 'gcc-.*|lib.*|runc' containerd
	run "$tmp/tree/usr/bin/containerd" --version
	run "$tmp/tree/usr/bin/containerd-shim-runc-v2" -v
	mkdir "$tmp/new"
	mkdir "$tmp/new/bin"
	mv "$tmp/tree"/usr/bin/{containerd,ctr,containerd-shim-runc-v2} "$tmp/new/bin"
	place "$tmp/new" "$cache/containerd-$1"
}

want_tools() { want_containerd17; }
ok_tools() {
	"$cache/bin/checkpointctl" --help >/dev/null 2>&1 && "$cache/bin/docker-registry" --version >/dev/null 2>&1 &&
		"$cache/bin/mkfs.btrfs" --version >/dev/null 2>&1 && "$cache/bin/mkfs.erofs" --version >/dev/null 2>&1
}
make_tools() {
	local path
	local -a programs=(usr/bin/checkpointctl usr/bin/docker-registry usr/sbin/mkfs.btrfs usr/bin/mkfs.erofs)
	say "checkpointctl, docker-registry, mkfs.btrfs, mkfs.erofs: fetching Debian $newer's privately"
	unpack "$newer" "$tmp/tree" "$skip_in_rootfs" checkpointctl docker-registry btrfs-progs erofs-utils
	for path in "${programs[@]}"; do wrap "$cache/private/tools" "$path" "$tmp/${path##*/}"; done
	place "$tmp/tree" "$cache/private/tools"
	for path in "${programs[@]}"; do place "$tmp/${path##*/}" "$cache/bin/${path##*/}"; done
}

kubernetes_programs=$repo/integration/kubernetes/programs
want_kubernetes() {
	local version
	version=$(cd "$kubernetes_programs" && go list -m -f '{{.Version}}' k8s.io/kubernetes) && printf 'source, %s\n' "$version"
}
ok_kubernetes() { "$cache/kubernetes/bin/kubelet" --version >/dev/null 2>&1; }
make_kubernetes() {
	local version=${want#source, } p package=k8s.io/component-base/version
	say "kubernetes: building $version (about 16 minutes on 2 cores with an empty Go cache)"
	# Programs tell their version to each other, and a client takes it apart.
	p="-s -w -X $package.gitVersion=$version -X $package.gitMajor=1 -X $package.gitMinor=$(cut -d. -f2 <<<"$version")"
	mkdir -p "$tmp/tree/bin"
	CGO_ENABLED=0 run go build -C "$kubernetes_programs" -trimpath -ldflags "$p" -o "$tmp/tree/bin/" \
		k8s.io/kubernetes/cmd/{kube-apiserver,kube-controller-manager,kube-scheduler,kubelet}
	place "$tmp/tree" "$cache/kubernetes"
}

want_cluster() { want_containerd17; }
ok_cluster() {
	"$cache/bin/kubectl" version --client >/dev/null 2>&1 && "$cache/bin/etcd" --version >/dev/null 2>&1
}
make_cluster() {
	local program
	say "etcd, kubectl: fetching Debian $newer's privately"
	unpack "$newer" "$tmp/tree" "$skip_in_rootfs" kubernetes-client etcd-server
	for program in kubectl etcd; do
		wrap "$cache/private/cluster" "usr/bin/$program" "$tmp/$program"
	done
	place "$tmp/tree" "$cache/private/cluster"
	for program in kubectl etcd; do place "$tmp/$program" "$cache/bin/$program"; done
}

want_podman() { printf 'Debian %s, on %s/bin/runc\n' "$newer" "$cache"; }
ok_podman() {
	"$cache/bin/podman" --version >/dev/null 2>&1 && "$cache/private/podman/usr/bin/conmon" --version >/dev/null 2>&1
}
make_podman() {
	local tree=$cache/private/podman loader program skip
	# What a container without a network does not need.
	skip="$skip_in_rootfs|containernetworking-plugins|crun|dirmngr|gnupg.*|gpg.*|iptables|libglib2.0-data|libldap2|libsasl2.*|openssl.*|pinentry-curses|readline-common"
	say "podman: fetching Debian $newer's privately"
	# Podman starts itself anew by /proc/self/exe, so a wrapper around the loader
	# will not do: loader and libraries are written into the programs. patchelf
	# 0.18, of all releases after bookworm, makes them crash.
	unpack bookworm "$tmp/tree" '' patchelf
	wrap "$tmp/patchelf" usr/bin/patchelf "$tmp/patch"
	place "$tmp/tree" "$tmp/patchelf"
	unpack "$newer" "$tmp/tree" "$skip" podman
	loader=("$tmp/tree"/usr/lib/*/ld-linux*.so.*)
	loader=$tree${loader[0]#"$tmp/tree"}
	for program in podman conmon; do
		run "$tmp/patch" --set-interpreter "$loader" --force-rpath --set-rpath "${loader%/*}" "$tmp/tree/usr/bin/$program"
	done
	# What is in /etc and /run of a host with Podman. The home is for the policy
	# on signatures, whose place no variable tells.
	mkdir -p "$tmp/tree/home/.config/containers"
	cp "$tmp/tree/etc/containers/policy.json" "$tmp/tree/home/.config/containers"
	cat >"$tmp/tree/containers.conf" <<-CONF
		[containers]
		log_driver = "k8s-file"
		seccomp_profile = "$tree/usr/share/containers/seccomp.json"
		[engine]
		cgroup_manager = "cgroupfs"
		conmon_path = ["$tree/usr/bin/conmon"]
		events_logger = "file"
		helper_binaries_dir = ["$tree/usr/lib/podman"]
		lock_type = "file"
		runtime = "runc"
		[engine.runtimes]
		crun = ["$cache/bin/crun"]
		runc = ["$cache/bin/runc"]
	CONF
	printf '[storage]\ndriver = "overlay"\n' >"$tmp/tree/storage.conf"
	cat >"$tmp/podman" <<-WRAPPER
		#!/bin/sh
		# Needs --root, --runroot and --tmpdir, or it works on the host's own containers.
		tree=$(quote "$tree")
		export HOME="\$tree/home" PATH=$(quote "$cache/bin"):"\$PATH" PODMAN_IGNORE_CGROUPSV1_WARNING=1
		export CONTAINERS_CONF="\$tree/containers.conf" CONTAINERS_STORAGE_CONF="\$tree/storage.conf"
		export CONTAINERS_REGISTRIES_CONF="\$tree/etc/containers/registries.conf"
		exec "\$tree/usr/bin/podman" "\$@"
	WRAPPER
	chmod 0755 "$tmp/podman"
	place "$tmp/tree" "$tree"
	place "$tmp/podman" "$cache/bin/podman"
}

# What only maintainer scripts and init systems need.
skip_in_rootfs='adduser|base-passwd|debconf|dpkg|gcc-.*-base|init-system-helpers|lib.*-perl|libaudit.*|libcap-ng0|libdb5.*|libdebconfclient0|libgdbm.*|libpam.*|libperl.*|libsemanage.*|libsepol.*|login.defs|lsb-base|media-types|netbase|passwd|perl.*|sysvinit-utils|tar|tzdata|usr-is-merged|usrmerge'

# rootfs NAME PACKAGE...: makes a root filesystem of packages of the host's own
# suite in $tmp/tree, with a busybox for a shell.
rootfs() {
	local name=$1 r=$tmp/tree applet
	shift
	debian_archive
	say "rootfs/$name: unpacking $* from Debian $host_codename"
	unpack "$host_suite" "$r" "$skip_in_rootfs" "$@" busybox-static
	mkdir -p "$r"/{dev,etc,proc,root,run,sys,tmp,var/tmp}
	chmod 1777 "$r"/{tmp,var/tmp}
	[[ -e $r/var/run ]] || ln -s ../run "$r/var/run"
	printf 'root:x:0:0:root:/root:/bin/sh\nredis:x:101:101::/var/lib/redis:/bin/false\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n' >"$r/etc/passwd"
	printf 'root:x:0:\nredis:x:101:\nnogroup:x:65534:\n' >"$r/etc/group"
	while read -r applet; do
		[[ $applet == */* ]] || continue
		mkdir -p "$r/${applet%/*}"
		[[ -e $r/$applet || -L $r/$applet ]] || ln -s /bin/busybox "$r/$applet"
	done < <("$r/bin/busybox" --list-full)
}

want_busybox() { printf 'Debian %s\n' "$host_codename"; }
ok_busybox() { [[ -d $cache/rootfs/busybox ]]; }
make_busybox() {
	rootfs busybox busybox-static
	run chroot "$tmp/tree" /bin/sh -c 'ls /proc /sys /dev /tmp'
	finish busybox
}

want_redis() { want_busybox; }
ok_redis() { [[ -d $cache/rootfs/redis ]]; }
make_redis() {
	rootfs redis redis-server redis-tools
	mkdir -p "$tmp/tree"/{data,var/lib/redis}
	run chroot "$tmp/tree" /usr/bin/redis-server --version
	run chroot "$tmp/tree" /usr/bin/redis-cli --version
	finish redis
}

python_modules='ctypes, fcntl, hashlib, json, mmap, multiprocessing, os, pty, random, select, signal, socket, struct, subprocess, sys, tempfile, threading, time'
want_python() { want_busybox; }
ok_python() { [[ -d $cache/rootfs/python ]]; }
make_python() {
	local lib
	rootfs python python3
	lib=("$tmp/tree"/usr/lib/python3.*)
	rm -rf "$tmp/tree"/usr/lib/python3*/{test,idlelib,lib2to3,ensurepip,pydoc_data,turtledemo,tkinter}
	# Compiled here, or a container's first start would write into its layer.
	run chroot "$tmp/tree" /usr/bin/python3 -m compileall -q --invalidation-mode unchecked-hash "${lib[@]#"$tmp/tree"}"
	run chroot "$tmp/tree" /usr/bin/python3 -c "import $python_modules"
	finish python
}

want_nginx() { want_busybox; }
ok_nginx() { [[ -d $cache/rootfs/nginx ]]; }
make_nginx() {
	rootfs nginx nginx
	mkdir -p "$tmp/tree"/var/{lib,log}/nginx
	run chroot "$tmp/tree" /usr/sbin/nginx -V
	finish nginx
}

want_java() { want_busybox; }
ok_java() { [[ -d $cache/rootfs/java ]]; }
make_java() {
	rootfs java default-jre-headless
	ln -s ../lib/jvm/default-java/bin/java "$tmp/tree/usr/bin/java"
	# It finds its libraries by /proc, which is not mounted there.
	run chroot "$tmp/tree" /bin/env LD_LIBRARY_PATH=/usr/lib/jvm/default-java/lib /usr/bin/java -version
	finish java
}

want_node() { want_busybox; }
ok_node() { [[ -d $cache/rootfs/node ]]; }
make_node() {
	rootfs node nodejs
	run chroot "$tmp/tree" /usr/bin/node --version
	finish node
}

finish() {
	chmod -R a+rX "$tmp/tree"
	place "$tmp/tree" "$cache/rootfs/$1"
}

# recipe COMPONENT: a checksum of the functions that make it.
recipe() {
	printf '%s' "$skip_in_rootfs" "$(declare -f "make_$1" build finish rootfs unpack wrap)" | cksum
}

# current COMPONENT: is it made from what it should be, as it should be, and does
# it work? Sets want.
current() {
	local stamp=()
	want=$("want_$1") || die "cannot tell what $1 is to be made from"
	[[ -f $cache/stamps/$1 ]] && mapfile -t stamp <"$cache/stamps/$1"
	[[ ${stamp[0]-} == "$want" && ${stamp[2]-} == "$(recipe "$1")" ]] && "ok_$1"
}

# --- commands ----------------------------------------------------------------

require_host() {
	((EUID == 0)) || die "must run as root (you are $(id -un)): it runs apt-get and CRIU"
	if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
		die "this host is not Debian-like (no apt-get). Install by other means, and put into PATH:
  containerd, ctr and containerd-shim-runc-v2 (the version in go.mod), runc >= 1.1, crun built with +CRIU and libcriu,
  criu (4.2 or later on Linux 6.16 and later, else 4.1), the CNI plugins in /usr/lib/cni, iptables, iproute2,
  and for building them: Go, gcc, the headers of libc and libseccomp, pkg-config"
	fi
	command -v go >/dev/null || die "no go in PATH: install Go as https://go.dev/doc/install says"
}

check() {
	local p c rc=0
	for p in "${packages[@]}"; do
		if have "$p"; then
			printf 'ok       %s\n' "$p"
		else
			rc=1
			printf 'missing  %s: apt-get install --no-install-recommends %s\n' "$p" "$p"
		fi
	done
	for c in "${components[@]}"; do
		if current "$c"; then
			printf 'ok       %s (%s)\n' "$c" "$want"
		else
			rc=1
			printf 'missing  %s: contrib/setup.sh\n' "$c"
		fi
	done
	return $rc
}

print_env() {
	printf 'export STASIS_CACHE=%s\n' "$(quote "$cache")"
	printf 'export PATH=%s:"$PATH"\n' "$(quote "$cache/bin")"
}

install_all() {
	local c start made=0
	mkdir -p "$cache"/{bin,private,rootfs,stamps}
	exec 9>"$cache/lock"
	flock -n 9 || {
		say "waiting for another setup that works on $cache"
		flock 9
	}
	# Left over by a setup that was killed.
	rm -rf "$cache"/tmp.*
	tmp=$(mktemp -d "$cache/tmp.XXXXXX")
	trap '[[ -z $child ]] || kill "$child" 2>/dev/null || true; rm -rf "$tmp"' EXIT
	trap 'exit 130' INT
	trap 'exit 143' TERM

	# Nothing that is started from here on, and may outlive us, shall hold the lock.
	install_packages 9>&-
	for c in "${components[@]}"; do
		if current "$c" 9>&-; then continue; fi
		start=$SECONDS note=
		rm -f "$cache/stamps/$c"
		"make_$c" 9>&-
		"ok_$c" || die "$c does not work after it was made"
		printf '%s\n' "$want" "$note" "$(recipe "$c")" >"$tmp/stamp"
		place "$tmp/stamp" "$cache/stamps/$c"
		rm -rf "$tmp/tree" "$tmp/gobin"
		made=$((made + 1))
		say "$c: done${note:+, $note} ($((SECONDS - start)) s)"
	done
	((made)) || say "nothing to do"
	summary
}

summary() {
	local c lines
	say "ready in $cache:"
	for c in "${components[@]}"; do
		mapfile -t lines <"$cache/stamps/$c"
		case $c in
		busybox | java | nginx | node | python | redis) printf '  %-20s %s\n' "rootfs/$c" "${lines[0]}${lines[1]:+, $c ${lines[1]}}" ;;
		tools) printf '  %-20s %s\n' bin/checkpointctl "${lines[0]}, ${lines[1]}" bin/docker-registry "${lines[0]}" ;;
		vm) printf '  %-20s %s\n' vm/ "Debian $newer, ${lines[1]}" ;;
		qemu) printf '  %-20s %s\n' bin/qemu-system-x86_64 "${lines[0]}${lines[1]:+, ${lines[1]}}" ;;
		containerd17) printf '  %-20s %s\n' containerd-1.7/bin "${lines[0]}, ${lines[1]}" ;;
		kubernetes) printf '  %-20s %s\n' kubernetes/bin "${lines[0]}" ;;
		cluster) printf '  %-20s %s\n' 'bin/etcd, kubectl' "${lines[0]}, ${lines[1]}" ;;
		containerd21) printf '  %-20s %s\n' containerd-2.1/bin "${lines[0]}, ${lines[1]}" ;;
		*) printf '  %-20s %s\n' "bin/$c" "${lines[0]}${lines[1]:+, ${lines[1]}}" ;;
		esac
	done
	say "for your shell: eval \"\$(contrib/setup.sh --env)\""
}

if [[ ${1-} == --kubernetes ]]; then
	components+=("${kubernetes_components[@]}")
	shift
fi
case ${1-} in
'') require_host && install_all ;;
--check) require_host && check ;;
--vm) require_host && . "$repo/contrib/vm/setup.sh" && install_all ;;
--env) print_env ;;
-h | --help) usage ;;
*)
	usage >&2
	exit 2
	;;
esac
