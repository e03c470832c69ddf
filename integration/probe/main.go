// Command probe is a workload that holds state of every kind that a checkpoint
// must carry, and can tell whether it still has it all. Tests run it inside a
// container:
//
//	probe run [-items a,b] ...   set the items up, say "ready", then count
//	probe check                  ask the running probe to check each item
//	probe items                  list the items, and what CRIU needs for each
//	probe gap                    measure for how long the process stands still
//	probe gap-max                ask the running one for the longest time
//
// The running probe prints a counter every second, and listens on a unix socket
// for the two that ask it. Any number of checks may follow each other, with
// checkpoints and restores between them: a check changes the state it looks at,
// so that the next one sees whether a change was carried too.
//
// It is one static program, and its children are itself: Go cannot fork.
package main

import (
	"bufio"
	"crypto/rand"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// defaultSocket is where the running probe listens.
const defaultSocket = "/run/probe.sock"

func main() {
	if len(os.Args) < 2 {
		fatal(fmt.Errorf("usage: probe run|check|items|gap|gap-max [flags]"))
	}
	p := &probe{}
	flags := flag.NewFlagSet(os.Args[1], flag.ExitOnError)
	flags.StringVar(&p.socket, "socket", defaultSocket, "unix socket to listen on or to ask at")
	switch os.Args[1] {
	case "run":
		names := flags.String("items", "all", "comma-separated items; all but the extra ones; or none")
		skip := flags.String("skip", "", "comma-separated items to leave out")
		flags.StringVar(&p.dir, "dir", "/var/probe", "folder for files")
		flags.StringVar(&p.connect, "connect", "", "address for the item out: an echo server")
		flags.IntVar(&p.mib, "mib", 8, "size of the item heap")
		flags.Parse(os.Args[2:])
		fatal(p.run(*names, *skip))
	case "check", "gap-max":
		flags.Parse(os.Args[2:])
		ask(p.socket, os.Args[1])
	case "items":
		for _, i := range items {
			fmt.Printf("%s\t%s\n", i.name, i.needs)
		}
	case "gap":
		flags.IntVar(&p.mib, "mib", 0, "size of a heap of random bytes")
		flags.IntVar(&p.dirty, "dirty", 0, "per cent of the heap that are written to all the time")
		flags.DurationVar(&p.every, "every", 100*time.Microsecond, "how often it looks")
		flags.Parse(os.Args[2:])
		fatal(p.gap())
	case "agent":
		agentMain()
	default:
		fatal(fmt.Errorf("no mode %q", os.Args[1]))
	}
}

func fatal(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "probe:", err)
		os.Exit(2)
	}
}

// ask sends a request to the running probe, prints its answer, and exits with 1
// if that says that a check failed.
func ask(socket, request string) {
	conn, err := net.Dial("unix", socket)
	fatal(err)
	fmt.Fprintln(conn, request)
	answer, err := bufio.NewReader(conn).ReadString('\n')
	fatal(err)
	fmt.Print(answer)
	var r report
	if json.Unmarshal([]byte(answer), &r) == nil && len(r.Failed) > 0 {
		os.Exit(1)
	}
	os.Exit(0)
}

// A probe is the running one.
type probe struct {
	socket, dir, connect string
	mib, dirty           int
	every                time.Duration
	counter              atomic.Int64
}

// An item is one kind of state.
type item struct {
	name string
	// needs names what CRIU must be told to dump or restore it. What begins
	// with "extra" is not part of all.
	needs string
	// setup makes it, and returns a function that checks it.
	setup func(p *probe) (check func() error, err error)
}

// A report is the answer to check.
type report struct {
	// ID is made at the start, and so tells a restored probe from a new one.
	ID     string            `json:"id"`
	Items  []string          `json:"items"`
	Failed map[string]string `json:"failed,omitempty"`
	// Counter advances every ten milliseconds.
	Counter int64 `json:"counter"`
	// Uptimes since the start, by two clocks.
	Monotonic time.Duration `json:"monotonic"`
	Boottime  time.Duration `json:"boottime"`
}

func (p *probe) run(names, skip string) error {
	if err := os.MkdirAll(p.dir, 0o755); err != nil {
		return err
	}
	r := report{ID: rand.Text(), Items: []string{}}
	checks := map[string]func() error{}
	chosen, skipped := strings.Split(names, ","), strings.Split(skip, ",")
	for _, i := range items {
		all := names == "all" && !strings.HasPrefix(i.needs, "extra") && (i.name != "out" || p.connect != "")
		if !all && !slices.Contains(chosen, i.name) || slices.Contains(skipped, i.name) {
			continue
		}
		check, err := i.setup(p)
		if err != nil {
			return fmt.Errorf("%s: %w", i.name, err)
		}
		checks[i.name] = check
		r.Items = append(r.Items, i.name)
	}
	for _, n := range chosen {
		if _, ok := checks[n]; !ok && n != "all" && n != "none" && !slices.Contains(skipped, n) {
			return fmt.Errorf("no item %q", n)
		}
	}
	monotonic, boottime := clock(unix.CLOCK_MONOTONIC), clock(unix.CLOCK_BOOTTIME)
	go p.count()
	return serve(p.socket, func(string) any {
		r.Failed = map[string]string{}
		for name, check := range checks {
			if err := within(2*patience, check); err != nil {
				r.Failed[name] = err.Error()
			}
		}
		r.Counter = p.counter.Load()
		r.Monotonic = clock(unix.CLOCK_MONOTONIC) - monotonic
		r.Boottime = clock(unix.CLOCK_BOOTTIME) - boottime
		return r
	})
}

// patience is how long a check waits, at most, for what takes milliseconds on an idle
// machine.
const patience = 30 * time.Second

// within calls f, and gives up on it after a time. It may then be called again
// while the first call goes on, whose results are of no interest any more.
func within(d time.Duration, f func() error) error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	select {
	case err := <-done:
		return err
	case <-time.After(d):
		return errors.New("the check hangs")
	}
}

// count advances the counter every ten milliseconds.
func (p *probe) count() {
	for tick := range time.Tick(10 * time.Millisecond) {
		_ = tick
		if n := p.counter.Add(1); n%100 == 0 {
			fmt.Println("counter", n)
		}
	}
}

// gap measures the longest time between two looks at the clock, of one thread
// that looks every so often.
func (p *probe) gap() error {
	if p.mib > 0 {
		mem, err := randomBytes(p.mib << 20)
		if err != nil {
			return err
		}
		go func() {
			for range time.Tick(10 * time.Millisecond) {
				for i := 0; i < len(mem)/100*p.dirty; i += os.Getpagesize() {
					mem[i]++
				}
			}
		}()
	}
	var longest atomic.Int64
	pause := unix.NsecToTimespec(p.every.Nanoseconds())
	go func() {
		runtime.LockOSThread()
		last := clock(unix.CLOCK_MONOTONIC)
		for {
			unix.Nanosleep(&pause, nil)
			now := clock(unix.CLOCK_MONOTONIC)
			// Who resets it meanwhile loses nothing but the old maximum.
			if gap := int64(now - last); gap > longest.Load() {
				longest.Store(gap)
			}
			last = now
		}
	}()
	return serve(p.socket, func(string) any { return longest.Swap(0) })
}

func clock(id int32) time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(id, &ts); err != nil {
		panic(err)
	}
	return time.Duration(ts.Nano())
}

// serve answers requests, one line of JSON to each line, one at a time.
func serve(socket string, answer func(request string) any) error {
	os.Remove(socket)
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	fmt.Println("ready")
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		for lines := bufio.NewScanner(conn); lines.Scan(); {
			json.NewEncoder(conn).Encode(answer(lines.Text()))
		}
		conn.Close()
	}
}
