package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"
)

// connStream is what is written at one end of a connection and read at another.
func connStream(seed string, w io.Writer, r io.Reader) *stream {
	return &stream{
		seed: seed,
		send: func(b []byte) error { _, err := w.Write(b); return err },
		recv: func(n int) ([]byte, error) {
			buf := make([]byte, n)
			_, err := io.ReadFull(r, buf)
			return buf, err
		},
	}
}

// connect makes a connection to a listener and returns its two ends.
func connect(l net.Listener) (client, server net.Conn, err error) {
	if client, err = net.Dial(l.Addr().Network(), l.Addr().String()); err != nil {
		return nil, nil, err
	}
	if server, err = l.Accept(); err != nil {
		return nil, nil, err
	}
	deadline := time.Now().Add(patience)
	return client, server, errors.Join(client.SetDeadline(deadline), server.SetDeadline(deadline))
}

// checkListener makes a new connection, uses it, and closes it.
func checkListener(l net.Listener) error {
	client, server, err := connect(l)
	if err != nil {
		return err
	}
	s := connStream("new", client, server)
	return errors.Join(s.fill(), s.check(), client.Close(), server.Close())
}

// connected is a listener and a connection to it with bytes in flight both ways.
func connected(l net.Listener) (func() error, error) {
	client, server, err := connect(l)
	if err != nil {
		return nil, err
	}
	to, from := connStream("to", client, server), connStream("from", server, client)
	return func() error {
		deadline := time.Now().Add(patience)
		client.SetDeadline(deadline)
		server.SetDeadline(deadline)
		return errors.Join(to.check(), from.check(), checkListener(l))
	}, errors.Join(to.fill(), from.fill())
}

func unixStream(p *probe) (func() error, error) {
	path := p.dir + "/stream.sock"
	os.Remove(path)
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	return connected(l)
}

// listenTCP listens on the loopback. By itself, Go would use Multipath TCP.
func listenTCP(multipath bool) (net.Listener, error) {
	var config net.ListenConfig
	config.SetMultipathTCP(multipath)
	return config.Listen(context.Background(), "tcp", "127.0.0.1:0")
}

func tcp(*probe) (func() error, error) {
	l, err := listenTCP(false)
	if err != nil {
		return nil, err
	}
	return connected(l)
}

// listen is a listener without connections, which CRIU can do without being
// told to.
func listen(*probe) (func() error, error) {
	l, err := listenTCP(false)
	return func() error { return checkListener(l) }, err
}

// mptcp is what a server written in Go has.
func mptcp(*probe) (func() error, error) {
	l, err := listenTCP(true)
	return func() error { return checkListener(l) }, err
}

// unixDgram is a pair of sockets with two packets in flight.
func unixDgram(p *probe) (func() error, error) {
	path := p.dir + "/dgram.sock"
	os.Remove(path)
	server, err := net.ListenPacket("unixgram", path)
	if err != nil {
		return nil, err
	}
	client, err := net.Dial("unixgram", path)
	if err != nil {
		return nil, err
	}
	n := 0
	fill := func() error {
		n += 2
		_, err := fmt.Fprintf(client, "packet %d", n-1)
		_, err2 := fmt.Fprintf(client, "packet %d", n)
		return errors.Join(err, err2)
	}
	return func() error {
		server.SetReadDeadline(time.Now().Add(patience))
		for i := range 2 {
			buf := make([]byte, 1000)
			size, _, err := server.ReadFrom(buf)
			if err != nil {
				return err
			}
			if err := equal("packet", string(buf[:size]), fmt.Sprint("packet ", n-1+i)); err != nil {
				return err
			}
		}
		return fill()
	}, fill()
}

// udp is a connection without packets in flight: CRIU loses those, as networks
// may.
func udp(*probe) (func() error, error) {
	server, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	client, err := net.Dial("udp", server.LocalAddr().String())
	return func() error {
		server.SetReadDeadline(time.Now().Add(patience))
		if _, err := io.WriteString(client, "packet"); err != nil {
			return err
		}
		buf := make([]byte, 1000)
		n, from, err := server.ReadFrom(buf)
		if err != nil {
			return err
		}
		return errors.Join(equal("packet", string(buf[:n]), "packet"),
			equal("sender", from.String(), client.LocalAddr().String()))
	}, err
}

// out is a connection to an echo server elsewhere.
func out(p *probe) (func() error, error) {
	conn, err := net.Dial("tcp", p.connect)
	if err != nil {
		return nil, err
	}
	answers := bufio.NewReader(conn)
	n := 0
	send := func() error {
		n++
		_, err := fmt.Fprintln(conn, n)
		return err
	}
	return func() error {
		conn.SetDeadline(time.Now().Add(patience))
		got, err := answers.ReadString('\n')
		if err != nil {
			return err
		}
		return errors.Join(equal("echo", got, fmt.Sprintln(n)), send())
	}, send()
}
