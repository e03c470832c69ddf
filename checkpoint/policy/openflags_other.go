//go:build !amd64

package policy

// largeFile is the kernel's O_LARGEFILE on arm64, which libraries say is 0.
const largeFile = 0o400000
