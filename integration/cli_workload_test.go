package integration

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/integration/stack"
)

// incrementer is a client of Redis that increments a counter all the time, over
// one connection. Both counts are right at any moment: sent is never less than
// what Redis has applied, acked never more.
type incrementer struct {
	sent, acked atomic.Int64
	stop        atomic.Bool
	end         chan error
}

// dialRedis connects to a Redis that answers.
func dialRedis(t *testing.T, s *stack.Stack, host string) net.Conn {
	t.Helper()
	var conn net.Conn
	s.Poll(s.Ctx(), "Redis", func() (ok bool) {
		var err error
		conn, err = net.Dial("tcp", net.JoinHostPort(host, "6379"))
		return err == nil
	})
	t.Cleanup(func() { conn.Close() })
	return conn
}

// redisNumber sends a command whose reply is a number.
func redisNumber(conn net.Conn, r *bufio.Reader, command string) (int64, error) {
	if _, err := fmt.Fprintf(conn, "%s\r\n", command); err != nil {
		return 0, err
	}
	line, err := r.ReadString('\n')
	if strings.HasPrefix(line, "$") { // a string, which comes in a line of its own
		line, err = r.ReadString('\n')
	}
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(strings.TrimPrefix(strings.TrimSpace(line), ":"), 10, 64)
}

func increment(conn net.Conn) *incrementer {
	i := &incrementer{end: make(chan error, 1)}
	go func() {
		r := bufio.NewReader(conn)
		for !i.stop.Load() {
			want := i.sent.Add(1)
			got, err := redisNumber(conn, r, "INCR counter")
			if err == nil && got != want {
				err = fmt.Errorf("the %dth INCR made it %d", want, got)
			}
			if err != nil {
				i.end <- err
				return
			}
			i.acked.Store(got)
		}
		i.end <- nil
	}()
	return i
}

// advances waits until Redis has done another hundred.
func (i *incrementer) advances(s *stack.Stack) {
	from := i.acked.Load()
	s.Poll(s.Ctx(), "the client's counter", func() bool { return i.acked.Load() > from+100 || len(i.end) > 0 })
}

// TestWorkloadRedis checkpoints Redis under load. The client's connection
// survives all of it, so each reply is one more than the one before; and what is
// restored beside the original has all that was acknowledged before its
// checkpoint, and nothing that was sent after it.
func TestWorkloadRedis(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	here := s.NewNetns()
	c := s.NewContainer(ctx, "c", stack.Redis, here.With(),
		stack.Args("redis-server", "--bind", "0.0.0.0", "--protected-mode", "no", "--save", "", "--dir", "/tmp"))
	c.Start(ctx)
	inc := increment(dialRedis(t, s, here.Addr))
	inc.advances(s)

	type moment struct {
		ref           string
		acked, before int64 // acknowledged before the checkpoint, sent before its end
	}
	var moments []moment
	for _, tag := range []string{"1", "2"} {
		m := moment{ref: "stasis.test/redis-cp:" + tag, acked: inc.acked.Load()}
		s.Stasis("checkpoint", "c", m.ref, "--tcp-established")
		m.before = inc.sent.Load()
		moments = append(moments, m)
		inc.advances(s)
	}
	acked := inc.acked.Load()
	s.Stasis("checkpoint", "c", "stasis.test/redis-cp:exit", "--tcp-established", "--exit")
	sent := inc.sent.Load()
	c.Wait(ctx)
	c.Delete(ctx)
	s.Stasis("restore", "stasis.test/redis-cp:exit", "d", "--allow-host", here.Path, "--wait-healthy", "redis-cli ping")
	d := load(t, s, "d")
	inc.advances(s)
	inc.stop.Store(true)
	if err := <-inc.end; err != nil {
		t.Errorf("the client: %v (%d acknowledged before the last checkpoint, %d sent before its end)", err, acked, sent)
	}
	conn := dialRedis(t, s, here.Addr)
	if n, err := redisNumber(conn, bufio.NewReader(conn), "GET counter"); err != nil || n != inc.acked.Load() {
		t.Errorf("the counter is %d, %v; %d were acknowledged", n, err, inc.acked.Load())
	}

	// Beside it, at another address, where the connection is closed.
	for _, m := range moments {
		there := s.NewNetns()
		s.Stasis("restore", m.ref, "e", "--network", "join="+there.Path)
		e := load(t, s, "e")
		conn := dialRedis(t, s, there.Addr)
		r := bufio.NewReader(conn)
		n, err := redisNumber(conn, r, "GET counter")
		if err != nil || n < m.acked || n > m.before {
			t.Errorf("%s: the counter is %d, %v; %d were acknowledged before, %d sent", m.ref, n, err, m.acked, m.before)
		}
		if next, err := redisNumber(conn, r, "INCR counter"); err != nil || next != n+1 {
			t.Errorf("%s: INCR made it %d, %v", m.ref, next, err)
		}
		e.Kill(ctx, syscall.SIGKILL)
		e.Delete(ctx)
	}
	d.Kill(ctx, syscall.SIGKILL)
	d.Delete(ctx)
	checkTidy(t, s)
}

// answering is a Python program that runs setup, and then answers each line in
// /ask with one in /answer: the value of an expression.
func answering(setup, answer string) []string {
	return []string{"python3", "-c", `
import hashlib, os, random, subprocess, sys, threading, time, queue
os.mkfifo("/ask"); os.mkfifo("/answer")
ask, replies = open("/ask", "r+b", buffering=0), open("/answer", "r+b", buffering=0)
` + setup + `
print("ready", flush=True)
while ask.readline(): replies.write((str(` + answer + `) + "\n").encode())
`}
}

func question(ctx context.Context, c *stack.Container) string {
	return c.Exec(ctx, "sh", "-c", "echo >/ask; head -n 1 /answer")
}

// TestWorkloadPython checkpoints a Python process with a random generator, an
// iterator at work, an open file, a thread at a queue, and a child at a pipe. The
// original and what is restored of it go on alike.
func TestWorkloadPython(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	c := s.NewContainer(ctx, "c", stack.Python, stack.Args(answering(`
def squares():
    n = random.randrange(1000)
    while True: n += 1; yield n * n
numbers = squares()
log = open("/log", "w+")
work, done = queue.Queue(), queue.Queue()
def thread():
    total = 0
    while True: total += work.get(); done.put(total)
threading.Thread(target=thread, daemon=True).start()
child = subprocess.Popen(["sh", "-c", "n=0; while read line; do n=$((n+line)); echo $n; done"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
def answer():
    n = next(numbers)
    work.put(n)
    child.stdin.write(b"%d\n" % n); child.stdin.flush()
    log.write("%d " % n); log.flush()
    return n, random.random(), done.get(), int(child.stdout.readline()), open("/log").read()
`, "answer()")...))
	c.Start(ctx)
	c.Stdout.WaitFor(ctx, "ready")
	for range 3 {
		question(ctx, c)
	}
	s.Stasis("checkpoint", "c", "stasis.test/py:1")
	s.Stasis("restore", "stasis.test/py:1", "d")
	d := load(t, s, "d")
	for range 3 {
		if original, restored := question(ctx, c), question(ctx, d); original != restored || original == "" {
			t.Errorf("the original says %q, the restored %q", original, restored)
		}
	}
	for _, c := range []*stack.Container{c, d} {
		c.Kill(ctx, syscall.SIGKILL)
		c.Delete(ctx)
	}
}

// TestWorkloadTree checkpoints a tree of processes with shared memory, pipes,
// sockets, and all else that the probe holds, and restores it beside the
// original.
func TestWorkloadTree(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	c := startProbe(ctx, s, "c")
	before := c.Probe(ctx)
	s.Stasis("checkpoint", "c", "stasis.test/probe-cp:1", "--tcp-established", "--file-locks")
	checkSame(t, before, c.Probe(ctx))
	s.Stasis("restore", "stasis.test/probe-cp:1", "d")
	d := load(t, s, "d")
	checkSame(t, before, d.Probe(ctx))
	checkSame(t, before, c.Probe(ctx))
	if r := d.Probe(ctx); len(r.Items) < 20 {
		t.Errorf("the probe has only %v", r.Items)
	}
	for _, c := range []*stack.Container{c, d} {
		c.Kill(ctx, syscall.SIGKILL)
		c.Delete(ctx)
	}
}

// TestWorkloadNginx checkpoints nginx's master and two workers. What is restored
// serves, and its master takes a new configuration with new workers.
func TestWorkloadNginx(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	here := s.NewNetns()
	// Its workers are root's too: of another user's processes, CRIU can only read
	// the limits with CAP_SYS_RESOURCE, which root in a container may lack.
	const config = `sed s/PAGE/%s/ >/nginx.conf <<END
user root; worker_processes 2; pid /run/nginx.pid; error_log /var/log/nginx/error.log;
events {}
http { access_log off; server { listen 80; location / { return 200 PAGE; } } }
END
`
	c := s.NewContainer(ctx, "c", stack.Nginx, here.With(),
		stack.Args("sh", "-c", fmt.Sprintf(config, "one")+"exec nginx -c /nginx.conf -g 'daemon off;'"))
	c.Start(ctx)
	web := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	serves := func(page string) {
		t.Helper()
		s.Poll(ctx, "nginx to serve page "+page, func() bool {
			r, err := web.Get("http://" + here.Addr)
			if err != nil {
				return false
			}
			defer r.Body.Close()
			body, err := io.ReadAll(r.Body)
			return err == nil && string(body) == page
		})
	}
	workers := func(c *stack.Container) []string {
		all := strings.Fields(c.Exec(ctx, "pidof", "nginx"))
		return slices.Sorted(slices.Values(slices.DeleteFunc(all, func(pid string) bool { return pid == "1" })))
	}
	serves("one")
	before := workers(c)
	if len(before) != 2 {
		t.Fatalf("workers %q", before)
	}
	s.Stasis("checkpoint", "c", "stasis.test/nginx-cp:1", "--exit", "--tcp-established")
	c.Wait(ctx)
	c.Delete(ctx)
	s.Stasis("restore", "stasis.test/nginx-cp:1", "d", "--allow-host", here.Path)
	d := load(t, s, "d")
	serves("one")
	if after := workers(d); !slices.Equal(after, before) {
		t.Errorf("workers %q, restored %q", before, after)
	}
	d.Exec(ctx, "sh", "-c", fmt.Sprintf(config, "two")+"kill -HUP 1")
	serves("two")
	s.Poll(ctx, "the old workers to end", func() bool {
		now := workers(d)
		return len(now) == 2 && !slices.Contains(before, now[0]) && !slices.Contains(before, now[1])
	})
	if code := d.Kill(ctx, syscall.SIGQUIT); code != 0 {
		t.Errorf("nginx, told to quit, ended with %d", code)
	}
	d.Delete(ctx)
	checkTidy(t, s)
}

// TestWorkloadManyFiles checkpoints a process with 100,000 small files in its
// writable layer.
func TestWorkloadManyFiles(t *testing.T) {
	// In memory if there is room: a disk may take half a minute to make them, three
	// times.
	var shm unix.Statfs_t
	if err := unix.Statfs("/dev/shm", &shm); err == nil && shm.Bavail*uint64(shm.Bsize) > 4<<30 {
		t.Setenv("TMPDIR", "/dev/shm")
	}
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	c := s.NewContainer(ctx, "c", stack.Python, stack.Args(answering(`
for d in range(100):
    os.makedirs("/files/%d" % d)
    for f in range(1000):
        fd = os.open("/files/%d/%d" % (d, f), os.O_CREAT | os.O_WRONLY, 0o600 + f % 64)
        os.write(fd, b"%d of %d\n" % (f, d) * (f % 4)); os.close(fd)
some = [open("/files/%d/999" % d) for d in range(100)]
def answer():
    sum, n = hashlib.sha256(), 0
    for d in range(100):
        for entry in sorted(os.scandir("/files/%d" % d), key=lambda e: e.name):
            with open(entry.path, "rb") as f: sum.update(b"%s %o\n%s" % (entry.path.encode(), os.fstat(f.fileno()).st_mode, f.read()))
            n += 1
        assert os.fstat(some[d].fileno()).st_ino == os.stat("/files/%d/999" % d).st_ino
    return n, sum.hexdigest()
`, "answer()")...))
	c.Start(ctx)
	c.Stdout.WaitFor(ctx, "ready")
	before := question(ctx, c)
	if !strings.HasPrefix(before, "(100000, ") {
		t.Fatalf("it made %q", before)
	}
	s.Stasis("checkpoint", "c", "stasis.test/files:1", "--exit")
	c.Wait(ctx)
	c.Delete(ctx)
	s.Stasis("restore", "stasis.test/files:1", "d")
	d := load(t, s, "d")
	if after := question(ctx, d); after != before {
		t.Errorf("it had %q, and has %q", before, after)
	}
	d.Kill(ctx, syscall.SIGKILL)
	d.Delete(ctx)
	checkTidy(t, s)
}
