package process

import (
	"context"
	"fmt"
	"sync"

	"github.com/containerd/console"
)

// epoller serves all terminals of the shim; most containers have none.
var epoller = sync.OnceValues(func() (*console.Epoller, error) {
	e, err := console.NewEpoller()
	if err != nil {
		return nil, err
	}
	go e.Wait()
	return e, nil
})

// attachConsole receives the terminal from the runtime and starts the copying.
func (p *IO) attachConsole(ctx context.Context) error {
	poller, err := epoller()
	if err != nil {
		return fmt.Errorf("poll the terminal: %w", err)
	}
	// The runtime has returned: the terminal is in the socket, or never comes.
	master, err := receiveMaster(ctx, p)
	if err != nil {
		return fmt.Errorf("receive the terminal from the runtime: %w", err)
	}
	cons, err := poller.Add(master)
	if err != nil {
		master.Close()
		return fmt.Errorf("poll the terminal: %w", err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.console = cons

	if p.in != nil {
		go func() {
			copyBuffer(cons, p.in)
			p.in.Close()
			// The end of a terminal's input is a hangup, as in upstream's
			// shim: there is no other way to tell the process.
			p.Hangup()
			cons.Close()
		}()
	}
	if logger := p.logger(); logger != nil {
		p.copies.Go(func() {
			copyBuffer(logger.out.w, cons)
			logger.out.w.Close()
		})
		return nil
	}
	if p.stdio.Stdout == "" {
		// Nobody listens; what the process writes has to go somewhere.
		p.copies.Go(func() { copyBuffer(discard{}, cons) })
		return nil
	}
	out, err := openOutput(ctx, p.stdio.Stdout)
	if err != nil {
		return err
	}
	p.closers = append(p.closers, out)
	p.copyOutput(out, cons)
	return nil
}

// receiveMaster waits for the terminal as long as ctx allows; closing the
// socket ends the wait.
func receiveMaster(ctx context.Context, p *IO) (console.Console, error) {
	stop := context.AfterFunc(ctx, func() { p.socket.Close() })
	defer stop()
	return p.socket.ReceiveMaster()
}

// Resize sets the terminal's size in characters; without a terminal it does
// nothing, as in upstream's shim.
func (p *IO) Resize(width, height uint16) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.console == nil {
		return nil
	}
	return p.console.Resize(console.WinSize{Width: width, Height: height})
}

// Hangup ends the reading from a terminal whose process is gone: another
// process may hold it open, and then it never ends by itself.
func (p *IO) Hangup() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hangup()
}

// hangup is Hangup with mu held.
func (p *IO) hangup() {
	cons, ok := p.console.(*console.EpollConsole)
	if !ok {
		return
	}
	if poller, err := epoller(); err == nil {
		_ = cons.Shutdown(poller.CloseConsole)
	}
}

type discard struct{}

func (discard) Write(b []byte) (int, error) { return len(b), nil }
