package policy

// largeFile is the kernel's O_LARGEFILE, which libraries say is 0.
const largeFile = 0o100000
