// criulog stops CRIU at a line of its log: no later than when the line is
// written. Polling the log from outside is some lines late, on a busy machine as
// late as the end of a dump.
//
// It is loaded into CRIU by LD_PRELOAD. faultrunc makes the file that
// CRIULOG_PAGE names and asks for lines in it; the processes that CRIU forks
// share the mapping, whatever namespaces they have entered. Who has written a
// line that is asked for waits until faultrunc lets it pass.
//
// CRIU may be linked with a C library that is not the host's, so this is linked
// with none: what it calls is found in CRIU's.

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

// page.go has the same.
enum { UNUSED, ASKED, REACHED, PASSED };

struct line {
	volatile int state;
	volatile int writer; // pid in the writer's namespace
	int length;
	char text[500];
};

enum { LINES = 8 };

static struct line *lines;

__attribute__((constructor)) static void attach(void)
{
	const char *path = getenv("CRIULOG_PAGE");
	if (!path)
		return;
	int fd = open(path, O_RDWR | O_CLOEXEC);
	if (fd < 0)
		return;
	void *page = mmap(NULL, LINES * sizeof *lines, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (page != MAP_FAILED)
		lines = page;
	close(fd);
}

static void pass(const void *data, size_t n)
{
	const struct timespec pause = { .tv_nsec = 100000 };
	for (struct line *l = lines; l < lines + LINES; l++) {
		if (l->state != ASKED || !memmem(data, n, l->text, l->length))
			continue;
		l->writer = getpid();
		if (__sync_bool_compare_and_swap(&l->state, ASKED, REACHED))
			while (l->state == REACHED)
				nanosleep(&pause, NULL);
	}
}

ssize_t write(int fd, const void *data, size_t n)
{
	ssize_t written = syscall(SYS_write, fd, data, n);
	// A line of the log begins with its time in parentheses.
	if (lines && written > 0 && *(const char *)data == '(') {
		int saved = errno;
		pass(data, written);
		errno = saved;
	}
	return written;
}
