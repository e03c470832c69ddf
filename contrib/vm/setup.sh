# shellcheck shell=bash disable=SC2154 # sourced by contrib/setup.sh, which sets tmp, cache, newer, …
#
# The components of contrib/setup.sh --vm: QEMU, and what a virtual machine with a
# stock kernel of Debian's starts from. `make test-vm` runs the tests in it; see
# integration/vm.
#
#   bin/qemu-system-x86_64
#   vm/vmlinuz         Debian's kernel for virtual machines
#   vm/initrd          finds the disks, and hands over (contrib/vm/init)
#   vm/root.img        ext4: a small Debian with systemd, and with the runc, crun
#                      and CRIU that it ships. Nobody writes to it

components=(qemu vm)

want_qemu() {
	local host
	if host=$(host_cmd qemu-system-x86_64); then
		printf 'the host: %s\n' "$host"
	else
		printf 'Debian %s in %s\n' "$newer" "$cache"
	fi
}
ok_qemu() { "$cache/bin/qemu-system-x86_64" -machine help >/dev/null 2>&1; }
make_qemu() {
	local tree=$cache/private/qemu modules
	[[ $(uname -m) == x86_64 ]] || die "the virtual machine is one of x86-64 only, and this host is $(uname -m)"
	if [[ $want == 'the host: '* ]]; then
		say "qemu: using the host's ${want#the host: }"
		link "${want#the host: }" "$cache/bin/qemu-system-x86_64"
		return
	fi
	say "qemu: host has none; fetching Debian $newer's privately"
	unpack "$newer" "$tmp/tree" '' qemu-system-x86
	modules=("$tmp/tree"/usr/lib/*/qemu)
	wrap "$tree" usr/bin/qemu-system-x86_64 "$tmp/qemu"
	# Where its firmware and modules are: not where it was built for.
	sed -i -e "s|^exec |export QEMU_MODULE_DIR=$(quote "$tree${modules[0]#"$tmp/tree"}")\n&|" \
		-e "s|\"\$@\"|-L $(quote "$tree/usr/share/qemu") -L $(quote "$tree/usr/share/seabios") &|" "$tmp/qemu"
	place "$tmp/tree" "$tree"
	place "$tmp/qemu" "$cache/bin/qemu-system-x86_64"
}

# What the machine consists of, and what of it only maintainer scripts need.
vm_packages=(linux-image-cloud-amd64 base-files base-passwd systemd-sysv dbus kmod liblzma5 busybox-static bash coreutils dash hostname grep gzip sed tar mawk findutils
	util-linux e2fsprogs mount iproute2 iptables containernetworking-plugins apparmor runc crun libcriu2 criu libseccomp2)
vm_skip='adduser|cpio|debconf|dpkg.*|dracut-install|gcc-.*-base|init-system-helpers|initramfs-tools.*|klibc-utils|libklibc|libdb5.*|libdebconfclient0|libsemanage.*|libsepol.*|linux-base|login.defs|logsave|passwd|perl.*|tzdata|udev'

# What the initrd loads to see a disk and mount it.
vm_modules=(virtio_pci virtio_blk ext4)

want_vm() { printf 'Debian %s: %s; initrd %s\n' "$newer" "${vm_packages[*]}" "$(cksum <"$repo/contrib/vm/init")"; }
ok_vm() { [[ -s $cache/vm/vmlinuz && -s $cache/vm/initrd && -s $cache/vm/root.img ]]; }
make_vm() {
	local tree=$tmp/tree new=$tmp/vm initrd=$tmp/initrd deb name d kernel mke2fs module path n=10
	[[ $(uname -m) == x86_64 ]] || die "the virtual machine is one of x86-64 only, and this host is $(uname -m)"
	mke2fs=$(host_cmd mke2fs) || die "no mke2fs on this host: apt-get install e2fsprogs"
	say "vm: unpacking Debian $newer with its kernel"
	apt_private "$newer"
	mkdir -p "$tmp/debs/partial" "$tree"/usr/{bin,sbin,lib,lib64} "$new"
	for d in bin sbin lib lib64; do ln -s "usr/$d" "$tree/$d"; done
	run "${apt[@]}" -o Dir::Cache::archives="$tmp/debs" install --download-only "${vm_packages[@]}"
	for deb in "$tmp/debs"/*.deb; do
		name=${deb##*/} name=${name%%_*}
		if [[ $name =~ ^($vm_skip)$ ]]; then continue; fi
		dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$tree" --keep-directory-symlink \
			--exclude='./usr/share/doc' --exclude='./usr/share/man' --exclude='./usr/share/locale' \
			--exclude='./usr/share/info' --exclude='./usr/lib/*/gconv' --exclude='./usr/lib/modules/*/kernel/sound' \
			--exclude='./usr/lib/modules/*/kernel/drivers/gpu'
	done
	rm -rf "$tmp/debs"

	# What maintainer scripts would have done.
	mkdir -p "$tree"/{dev,etc,proc,root,run,stasis,sys,tmp,var/tmp,var/lib/dbus}
	chmod 1777 "$tree"/{tmp,var/tmp}
	ln -sfn ../run "$tree/var/run"
	cp "$tree/usr/share/base-passwd/passwd.master" "$tree/etc/passwd"
	cp "$tree/usr/share/base-passwd/group.master" "$tree/etc/group"
	run chroot "$tree" /usr/bin/systemd-sysusers
	for name in iptables ip6tables; do
		ln -sfn xtables-nft-multi "$tree/usr/sbin/$name"
		ln -sfn xtables-nft-multi "$tree/usr/sbin/$name-save"
		ln -sfn xtables-nft-multi "$tree/usr/sbin/$name-restore"
	done
	[[ -e $tree/usr/bin/awk ]] || ln -s mawk "$tree/usr/bin/awk"
	printf 'stasis-vm\n' >"$tree/etc/hostname"
	printf '127.0.0.1 localhost stasis-vm\n' >"$tree/etc/hosts"
	kernel=$(echo "$tree"/usr/lib/modules/*)
	kernel=${kernel##*/}
	run chroot "$tree" /usr/sbin/depmod "$kernel"
	# It says nothing where it cannot read compressed modules.
	grep -q '^kernel/net/bridge/bridge\.ko.*: .*llc' "$tree/usr/lib/modules/$kernel/modules.dep" ||
		die "depmod found no dependencies among the modules of Linux $kernel"
	run chroot "$tree" /usr/bin/runc --version
	run chroot "$tree" /usr/sbin/criu --version

	mv "$tree/boot/vmlinuz-$kernel" "$new/vmlinuz"
	rm -rf "$tree/boot"

	# A busybox, a few modules in the order in which they must be loaded, and a
	# script.
	mkdir -p "$initrd"/{bin,dev,modules,proc,root,sys}
	cp "$tree/usr/bin/busybox" "$initrd/bin"
	install -m 0755 "$repo/contrib/vm/init" "$initrd/init"
	for module in "${vm_modules[@]}"; do
		while read -r _ path _; do
			path=${path##*/lib/modules/}
			name=${path##*/} name=${name%%.ko*}
			if [[ -n $(echo "$initrd/modules"/*-"$name.ko") ]]; then continue; fi
			chroot "$tree" /usr/bin/busybox xzcat "/usr/lib/modules/$path" >"$initrd/modules/$n-$name.ko"
			n=$((n + 1))
		done < <(chroot "$tree" /usr/sbin/modprobe -S "$kernel" --show-depends "$module" | grep '^insmod ')
	done
	(cd "$initrd" && find . | "$tree/usr/bin/busybox" cpio -o -H newc 2>/dev/null | gzip -n) >"$new/initrd"
	rm -rf "$initrd"

	# Sparse: it is as large as what is in it, and writes go elsewhere.
	run "$mke2fs" -q -t ext4 -O ^has_journal -d "$tree" "$new/root.img" 8G
	note="Linux $kernel"
	place "$new" "$cache/vm"
}
