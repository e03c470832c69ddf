package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/pkg/oci"

	"github.com/stasis-run/stasis/integration/stack"
)

const redisPort = "6379"

// redis is a Redis server with many keys.
type redis struct {
	keys   int
	conn   *redisConn // made before the checkpoint
	before map[string]string
}

func (r *redis) spec() (string, []oci.SpecOpts) {
	return stack.Redis, []oci.SpecOpts{
		stack.Args("redis-server", "--bind", "0.0.0.0", "--protected-mode", "no", "--save", "", "--dir", "/tmp"),
	}
}

func (r *redis) connect(ctx context.Context, addr string) error {
	return poll(ctx, "connect to Redis", func() (err error) {
		if r.conn, err = dialRedis(addr); err != nil {
			return err
		}
		_, err = r.conn.do("PING")
		return err
	})
}

func (r *redis) close() {
	if r.conn != nil {
		r.conn.Close()
	}
}

func redisKey(i int) string { return fmt.Sprintf("key:%06d", i) }

func redisValue(i int) string {
	return fmt.Sprintf("%x", sha256.Sum256([]byte(redisKey(i))))
}

func (r *redis) load() (string, error) {
	err := r.conn.pipeline(r.keys, func(i int) []string {
		return []string{"SET", redisKey(i), redisValue(i)}
	}, func(i int, reply string) error {
		if reply != "OK" {
			return fmt.Errorf("SET %s: %s", redisKey(i), reply)
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	r.before, err = r.conn.info()
	return fmt.Sprintf("%d keys of 64 bytes each, over one TCP connection", r.keys), err
}

func (r *redis) verify(addr string) ([]string, error) {
	var found []string
	fresh, err := dialRedis(addr)
	if err != nil {
		return nil, err
	}
	defer fresh.Close()
	for name, conn := range map[string]*redisConn{"the connection made before the checkpoint": r.conn, "a new connection": fresh} {
		size, err := conn.do("DBSIZE")
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		if size != strconv.Itoa(r.keys) {
			return nil, fmt.Errorf("%s: %s keys, want %d", name, size, r.keys)
		}
		err = conn.pipeline(r.keys, func(i int) []string {
			return []string{"GET", redisKey(i)}
		}, func(i int, reply string) error {
			if reply != redisValue(i) {
				return fmt.Errorf("%s is %q", redisKey(i), reply)
			}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		found = append(found, fmt.Sprintf("every one of %d keys has its value, asked over %s", r.keys, name))
	}
	after, err := r.conn.info()
	if err != nil {
		return nil, err
	}
	if after["run_id"] != r.before["run_id"] || after["process_id"] != r.before["process_id"] {
		return nil, fmt.Errorf("another server answers: run id %s, process %s; want %s, %s",
			after["run_id"], after["process_id"], r.before["run_id"], r.before["process_id"])
	}
	then, err1 := strconv.Atoi(r.before["uptime_in_seconds"])
	now, err2 := strconv.Atoi(after["uptime_in_seconds"])
	if err := errors.Join(err1, err2); err != nil || now < then {
		return nil, fmt.Errorf("its uptime went from %q to %q", r.before["uptime_in_seconds"], after["uptime_in_seconds"])
	}
	return append(found,
		"the same process: run id "+after["run_id"],
		fmt.Sprintf("its uptime went on: %d s before, %d s after", then, now),
	), nil
}

// redisConn speaks Redis's protocol, RESP
// (https://redis.io/docs/latest/develop/reference/protocol-spec/).
type redisConn struct {
	net.Conn
	r *bufio.Reader
}

func dialRedis(addr string) (*redisConn, error) {
	conn, err := net.Dial("tcp", net.JoinHostPort(addr, redisPort))
	if err != nil {
		return nil, err
	}
	return &redisConn{Conn: conn, r: bufio.NewReaderSize(conn, 1<<16)}, nil
}

func command(args []string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "*%d\r\n", len(args))
	for _, a := range args {
		fmt.Fprintf(&b, "$%d\r\n%s\r\n", len(a), a)
	}
	return b.String()
}

func (c *redisConn) do(args ...string) (string, error) {
	if _, err := io.WriteString(c, command(args)); err != nil {
		return "", err
	}
	return c.reply()
}

// reply reads a reply that is no array.
func (c *redisConn) reply() (string, error) {
	line, err := c.r.ReadString('\n')
	if err != nil {
		return "", err
	}
	line = strings.TrimSuffix(line, "\r\n")
	switch line[0] {
	case '+', ':':
		return line[1:], nil
	case '-':
		return "", errors.New("Redis says: " + line[1:])
	case '$':
		n, err := strconv.Atoi(line[1:])
		if err != nil || n < 0 {
			return "", err
		}
		data := make([]byte, n+2)
		_, err = io.ReadFull(c.r, data)
		return string(data[:n]), err
	}
	return "", fmt.Errorf("reply %q", line)
}

// pipeline sends n commands without waiting for the replies, which it checks
// meanwhile.
func (c *redisConn) pipeline(n int, cmd func(i int) []string, check func(i int, reply string) error) error {
	sent := make(chan error, 1)
	go func() {
		w := bufio.NewWriterSize(c, 1<<16)
		for i := range n {
			if _, err := w.WriteString(command(cmd(i))); err != nil {
				sent <- err
				return
			}
		}
		sent <- w.Flush()
	}()
	for i := range n {
		reply, err := c.reply()
		if err == nil {
			err = check(i, reply)
		}
		if err != nil {
			return err
		}
	}
	return <-sent
}

// info returns what INFO server says.
func (c *redisConn) info() (map[string]string, error) {
	text, err := c.do("INFO", "server")
	info := map[string]string{}
	for line := range strings.Lines(text) {
		if key, value, ok := strings.Cut(strings.TrimSpace(line), ":"); ok {
			info[key] = value
		}
	}
	return info, err
}
