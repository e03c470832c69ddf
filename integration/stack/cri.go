package stack

import "strings"

func (s *Stack) criConfig(b *strings.Builder) {}
