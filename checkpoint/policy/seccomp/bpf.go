package seccomp

import (
	"encoding/binary"
	"math/bits"
	"slices"

	"golang.org/x/sys/unix"
)

// This file asks what a seccomp filter answers: for one system call with certain
// arguments, or for one with any.

// bpfProgram is a filter as the kernel takes it: classic BPF, which only jumps
// forward, over the 64 bytes that describe a system call.
type bpfProgram []bpfInsn

type bpfInsn struct {
	code   uint16
	jt, jf uint8
	k      uint32
}

func parseBPF(data []byte) (bpfProgram, bool) {
	if len(data) == 0 || len(data)%8 != 0 || len(data) > 8*unix.BPF_MAXINSNS {
		return nil, false
	}
	p := make(bpfProgram, len(data)/8)
	for i := range p {
		b := data[8*i:]
		p[i] = bpfInsn{binary.NativeEndian.Uint16(b), b[2], b[3], binary.NativeEndian.Uint32(b[4:])}
	}
	return p, true
}

// The words of struct seccomp_data: number, architecture, instruction pointer,
// arguments; the low half of an argument comes first on all our architectures.
const (
	wordNumber = 0
	wordArch   = 1
	wordArgs   = 4
	dataWords  = 16
)

type seccompData [dataWords]uint32

// value is what a register can hold: a number, or a word of the system call's
// that is not known, with a mask on it, or anything.
type value struct {
	kind valueKind
	n    uint32 // the number, or the mask
	word int
}

type valueKind uint8

const (
	isAnything valueKind = iota
	isNumber
	isWord
)

func number(n uint32) value { return value{kind: isNumber, n: n} }

// atom is a question that a filter asks of a word: is word&mask equal to k, or
// above it.
type atom struct {
	word    int
	mask, k uint32
	order   bool // a comparison of sizes
}

// answers is what a filter may answer to a system call with any arguments.
type answers struct {
	permits bool   // there is a way to an answer that lets it through
	atoms   []atom // what that depends on
	opaque  bool   // there are questions that no atom can tell
}

// maxSteps bounds the instructions that are looked at for one system call. What
// libseccomp makes takes as many as the filter has.
const maxSteps = 1 << 14

// explore follows all ways through a filter that a system call with known words
// can take. ok is false if there are too many of them, or the filter is not one
// that the kernel would take.
func (p bpfProgram) explore(known map[int]uint32) (out answers, ok bool) {
	type state struct {
		pc   int
		a, x value
		mem  [16]value
	}
	work := []state{{a: number(0), x: number(0)}}
	for steps := 0; len(work) > 0; {
		s := work[len(work)-1]
		work = work[:len(work)-1]
	path:
		for {
			if steps++; steps > maxSteps || s.pc >= len(p) {
				return out, false
			}
			in := p[s.pc]
			s.pc++
			switch in.code {
			case unix.BPF_LD | unix.BPF_W | unix.BPF_ABS:
				if in.k%4 != 0 || in.k/4 >= dataWords {
					return out, false
				}
				word := int(in.k / 4)
				if n, is := known[word]; is {
					s.a = number(n)
				} else {
					s.a = value{isWord, ^uint32(0), word}
				}
			case unix.BPF_LD | unix.BPF_W | unix.BPF_LEN:
				s.a = number(4 * dataWords)
			case unix.BPF_LDX | unix.BPF_W | unix.BPF_LEN:
				s.x = number(4 * dataWords)
			case unix.BPF_LD | unix.BPF_IMM:
				s.a = number(in.k)
			case unix.BPF_LDX | unix.BPF_IMM:
				s.x = number(in.k)
			case unix.BPF_LD | unix.BPF_MEM, unix.BPF_LDX | unix.BPF_MEM, unix.BPF_ST, unix.BPF_STX:
				if in.k >= uint32(len(s.mem)) {
					return out, false
				}
				switch in.code {
				case unix.BPF_LD | unix.BPF_MEM:
					s.a = s.mem[in.k]
				case unix.BPF_LDX | unix.BPF_MEM:
					s.x = s.mem[in.k]
				case unix.BPF_ST:
					s.mem[in.k] = s.a
				case unix.BPF_STX:
					s.mem[in.k] = s.x
				}
			case unix.BPF_MISC | unix.BPF_TAX:
				s.x = s.a
			case unix.BPF_MISC | unix.BPF_TXA:
				s.a = s.x
			case unix.BPF_JMP | unix.BPF_JA:
				if in.k > uint32(len(p)) {
					return out, false
				}
				s.pc += int(in.k)
			case unix.BPF_RET | unix.BPF_K:
				out.permits = out.permits || permits(in.k)
				break path
			case unix.BPF_RET | unix.BPF_A:
				out.permits = out.permits || s.a.kind != isNumber || permits(s.a.n)
				break path
			default:
				operand := number(in.k)
				if in.code&unix.BPF_X != 0 {
					operand = s.x
				}
				switch in.code & 0x07 {
				case unix.BPF_ALU:
					if s.a, ok = calculate(in.code&0xf0, s.a, operand); !ok {
						return out, false
					}
				case unix.BPF_JMP:
					taken, sure := jump(in.code&0xf0, s.a, operand)
					if !sure {
						out.ask(in.code&0xf0, s.a, operand)
						other := s
						other.pc += int(in.jf)
						work = append(work, other)
						taken = true
					}
					if taken {
						s.pc += int(in.jt)
					} else {
						s.pc += int(in.jf)
					}
				default:
					return out, false
				}
			}
		}
	}
	return out, true
}

// permits tells whether an answer can let a system call through. A tracer and a
// supervisor can, and either might be a process of the checkpoint itself.
func permits(answer uint32) bool {
	switch answer & unix.SECCOMP_RET_ACTION_FULL {
	case unix.SECCOMP_RET_ALLOW, unix.SECCOMP_RET_LOG, unix.SECCOMP_RET_TRACE, unix.SECCOMP_RET_USER_NOTIF:
		return true
	}
	return false
}

func calculate(op uint16, a, b value) (value, bool) {
	if op == unix.BPF_AND && a.kind == isWord && b.kind == isNumber {
		a.n &= b.n
		return a, true
	}
	known := a.kind == isNumber && b.kind == isNumber
	if op == unix.BPF_NEG {
		known = a.kind == isNumber
	}
	if !known {
		return value{}, op <= unix.BPF_XOR
	}
	x, y := a.n, b.n
	switch op {
	case unix.BPF_ADD:
		x += y
	case unix.BPF_SUB:
		x -= y
	case unix.BPF_MUL:
		x *= y
	case unix.BPF_DIV, unix.BPF_MOD:
		if y == 0 {
			return value{}, false
		}
		if op == unix.BPF_DIV {
			x /= y
		} else {
			x %= y
		}
	case unix.BPF_OR:
		x |= y
	case unix.BPF_AND:
		x &= y
	case unix.BPF_XOR:
		x ^= y
	case unix.BPF_LSH:
		x <<= y & 31
	case unix.BPF_RSH:
		x >>= y & 31
	case unix.BPF_NEG:
		x = -x
	default:
		return value{}, false
	}
	return number(x), true
}

// jump decides a conditional jump, if that can be told.
func jump(op uint16, a, b value) (taken, sure bool) {
	if a.kind != isNumber || b.kind != isNumber {
		return false, false
	}
	switch op {
	case unix.BPF_JEQ:
		return a.n == b.n, true
	case unix.BPF_JGT:
		return a.n > b.n, true
	case unix.BPF_JGE:
		return a.n >= b.n, true
	case unix.BPF_JSET:
		return a.n&b.n != 0, true
	}
	return false, false
}

// ask notes a question that could not be decided.
func (out *answers) ask(op uint16, a, b value) {
	if a.kind != isWord || b.kind != isNumber {
		out.opaque = true
		return
	}
	q := atom{word: a.word, mask: a.n, k: b.n}
	switch op {
	case unix.BPF_JEQ:
	case unix.BPF_JGT:
		q.order = true
	case unix.BPF_JGE:
		q.order = true
	case unix.BPF_JSET:
		q.mask, q.k = a.n&b.n, 0
	default:
		out.opaque = true
		return
	}
	if !slices.Contains(out.atoms, q) {
		out.atoms = append(out.atoms, q)
	}
}

// maxCases bounds the combinations of arguments that are tried for one system call.
const maxCases = 1 << 14

// cases returns values of a word that between them give every combination of
// answers that the atoms on it can have; ok is false if there are too many.
func cases(atoms []atom) (values []uint32, ok bool) {
	var union uint32
	same, order := true, false
	for _, q := range atoms {
		union |= q.mask
		same = same && q.mask == atoms[0].mask
		order = order || q.order
	}
	switch {
	case same && union == ^uint32(0):
		values = append(values, 0, ^uint32(0))
		for _, q := range atoms {
			values = append(values, q.k-1, q.k, q.k+1)
		}
	case !order && bits.OnesCount32(union) <= 10:
		for v := union; ; v = (v - 1) & union { // all its subsets
			values = append(values, v)
			if v == 0 {
				break
			}
		}
	case !order && same:
		var taken []uint32
		for _, q := range atoms {
			taken = append(taken, q.k)
		}
		values = append(values, taken...)
		for v := union; ; v = (v - 1) & union { // one that equals none of them
			if !slices.Contains(taken, v) {
				values = append(values, v)
				break
			}
			if v == 0 {
				break
			}
		}
	default:
		return nil, false
	}
	slices.Sort(values)
	return slices.Compact(values), true
}

// run answers one system call.
func (p bpfProgram) run(data *seccompData) (permitted, ok bool) {
	known := make(map[int]uint32, dataWords)
	for i, w := range data {
		known[i] = w
	}
	out, ok := p.explore(known)
	return out.permits, ok && !out.opaque
}
