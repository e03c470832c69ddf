package main

import (
	"errors"
	"fmt"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/stasis-run/stasis/checkpoint/capture"
)

// byteSize is a flag: a number of bytes, such as 64M.
type byteSize int64

func (s *byteSize) Type() string { return "SIZE" }
func (s *byteSize) String() string {
	if *s == 0 {
		return ""
	}
	return size(int64(*s))
}

func (s *byteSize) Set(text string) error {
	n, err := units.RAMInBytes(text)
	if err != nil || n <= 0 {
		return errors.New("it is a size, such as 64M or 20G")
	}
	*s = byteSize(n)
	return nil
}

const maxSizeFlag = "max-size"

// addMaxSize adds the flag --max-size to a command that unpacks checkpoints.
func (a *app) addMaxSize(cmd *cobra.Command) {
	cmd.Flags().Var(&a.maxSize, maxSizeFlag, "largest checkpoint that is unpacked, such as 20G; default: half of what is free on the disk")
}

// explainSize says of an error of capture.ErrTooLarge what a user can do.
func (a *app) explainSize(cmd *cobra.Command, err error) error {
	if !errors.Is(err, capture.ErrTooLarge) {
		return err
	}
	if a.maxSize == 0 {
		err = fmt.Errorf("%w (half of what is free on the disk)", err)
	}
	if cmd.Flags().Lookup(maxSizeFlag) != nil {
		err = fmt.Errorf("%w; --%s allows more", err, maxSizeFlag)
	}
	return err
}
