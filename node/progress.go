package node

import (
	"io"
	"sync"
)

// Progress is told how an operation comes along: when a stage begins, and often
// while it goes on. It must not wait, and is called from several goroutines. A nil
// Progress is told nothing.
type Progress func(Update)

// Update is how far the work on one thing is.
type Update struct {
	// Of is a container, an image or a file, as the user knows it.
	Of string
	// Stage is what is being done, in a word: "dump", "store", "push". It is empty
	// when the work on Of has ended, or for a while shows nothing.
	Stage string
	// Done is how many bytes are, of Total. A Total of 0 is not known, and what is
	// known of one may change.
	Done, Total int64
}

// stages tells a Progress of the work on one thing.
type stages struct {
	tell Progress
	of   string

	mu    sync.Mutex
	stage string
}

func (p Progress) of(name string) *stages { return &stages{tell: p, of: name} }

// silent tells that nobody is told.
func (s *stages) silent() bool { return s.tell == nil }

// begin begins the next stage. The same name again changes nothing.
func (s *stages) begin(stage string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stage != stage && s.tell != nil {
		s.tell(Update{Of: s.of, Stage: stage})
	}
	s.stage = stage
}

// set says how many bytes of how many are done in this stage; a total of 0 is unknown.
func (s *stages) set(done, total int64) {
	if s.tell == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stage != "" { // else it has ended
		s.tell(Update{s.of, s.stage, done, total})
	}
}

// end ends the last stage.
func (s *stages) end() { s.begin("") }

// counting tells how much passes through it.
type counting struct {
	w    io.Writer
	bar  *stages
	done int64
}

func (c *counting) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.done += int64(n)
	c.bar.set(c.done, 0)
	return n, err
}
