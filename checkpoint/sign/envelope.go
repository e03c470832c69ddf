package sign

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"slices"

	"github.com/secure-systems-lab/go-securesystemslib/dsse"

	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/checkpoint/layout"
)

const (
	// MaxEnvelope bounds an envelope, in bytes: a manifest of the largest size
	// in base64, and the signatures.
	MaxEnvelope = 24 << 20
	// maxSignatures: one for each key of a rotation is enough.
	maxSignatures = 16
	// maxPunctuation are the commas and opening braces of so many.
	maxPunctuation = 4 + 4*maxSignatures
)

// envelope is one that was decoded.
type envelope struct {
	payload    []byte
	signatures []signature
}

type signature struct {
	keyID string
	sig   []byte
}

// decode reads an envelope. It takes one form of everything, so that two readers
// cannot see two things in it.
func decode(data []byte) (*envelope, error) {
	if len(data) > MaxEnvelope {
		return nil, fault.Invalid("%s: larger than %d bytes", layout.Signature, MaxEnvelope)
	}
	// Its decoded form may take a hundred times the memory of its text. Base64 has none
	// of these.
	if n := bytes.Count(data, []byte(",")) + bytes.Count(data, []byte("{")); n > maxPunctuation {
		return nil, fault.Invalid("%s: has more than %d signatures", layout.Signature, maxSignatures)
	}
	var raw dsse.Envelope
	d := json.NewDecoder(bytes.NewReader(data))
	if err := d.Decode(&raw); err != nil {
		return nil, fault.Invalid("%s: no envelope: %v", layout.Signature, err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, fault.Invalid("%s: something follows the envelope's closing brace", layout.Signature)
	}
	if raw.PayloadType != PayloadType {
		return nil, fault.Invalid("%s: signs %.100q, which is no %s", layout.Signature, raw.PayloadType, PayloadType)
	}
	if n := len(raw.Signatures); n == 0 || n > maxSignatures {
		return nil, fault.Invalid("%s: has %d signatures; from 1 to %d are expected", layout.Signature, n, maxSignatures)
	}
	e := &envelope{}
	var err error
	if e.payload, err = base64.StdEncoding.Strict().DecodeString(raw.Payload); err != nil {
		return nil, fault.Invalid("%s: payload: %v", layout.Signature, err)
	}
	for i, s := range raw.Signatures {
		sig, err := base64.StdEncoding.Strict().DecodeString(s.Sig)
		switch {
		case err != nil || len(sig) != ed25519.SignatureSize:
			return nil, fault.Invalid("%s: signatures[%d] is none of Ed25519", layout.Signature, i)
		case !validID(s.KeyID):
			return nil, fault.Invalid("%s: signatures[%d]: %.80q is no key ID", layout.Signature, i, s.KeyID)
		case slices.ContainsFunc(e.signatures, func(other signature) bool { return other.keyID == s.KeyID }):
			return nil, fault.Invalid("%s: two signatures of key %s", layout.Signature, Short(s.KeyID))
		}
		e.signatures = append(e.signatures, signature{s.KeyID, sig})
	}
	return e, nil
}

// dsseSigner is a Key for package dsse.
type dsseSigner struct{ *Key }

func (s dsseSigner) Sign(_ context.Context, data []byte) ([]byte, error) {
	return ed25519.Sign(s.private, data), nil
}

func (s dsseSigner) KeyID() (string, error) { return s.ID, nil }

// Sign returns an envelope with a signature of the payload, and those of an older
// envelope of the same payload, unless that is nil.
func (k *Key) Sign(payload, older []byte) ([]byte, error) {
	signer, err := dsse.NewEnvelopeSigner(dsseSigner{k})
	if err != nil {
		return nil, err
	}
	made, err := signer.SignPayload(context.Background(), PayloadType, payload)
	if err != nil {
		return nil, err
	}
	if older != nil {
		old, err := decode(older)
		if err != nil {
			return nil, err
		}
		if !bytes.Equal(old.payload, payload) {
			return nil, fault.Invalid("%s: it signs something else", layout.Signature)
		}
		for _, s := range old.signatures {
			if s.keyID != k.ID {
				made.Signatures = append(made.Signatures, dsse.Signature{KeyID: s.keyID, Sig: base64.StdEncoding.EncodeToString(s.sig)})
			}
		}
		if len(made.Signatures) > maxSignatures {
			return nil, fault.Invalid("%s: it has %d signatures already, which is all that there can be", layout.Signature, len(old.signatures))
		}
	}
	data, err := json.Marshal(made)
	if err != nil {
		return nil, err
	}
	return append(data, '\n'), nil
}

// KeyIDs returns those that an envelope says it is signed by. Nothing is verified.
func KeyIDs(data []byte) ([]string, error) {
	e, err := decode(data)
	if err != nil {
		return nil, err
	}
	var ids []string
	for _, s := range e.signatures {
		ids = append(ids, s.keyID)
	}
	return ids, nil
}

// Signer is whose signature was verified.
type Signer struct {
	KeyID string `json:"key"`
	// Own: it is the key that this node signs with.
	Own bool `json:"own"`
	// File is where the public key is, or "" of the node's own.
	File string `json:"file,omitempty"`
}

// Whose says what the key is to this node.
func (s Signer) Whose() string {
	if s.Own {
		return "this node's"
	}
	return "trusted"
}

// Verdict is what is found of an envelope.
type Verdict struct {
	// Signers are those that are trusted and have signed; the node's own is first.
	Signers []Signer
	// Unknown are IDs of keys that are not trusted, of which nothing is known.
	Unknown []string
}

// Verify tells who has signed the payload, which is all that stasis.json has. That
// the envelope is of another payload, or a signature of a key that is trusted is not
// right, is an error that matches errdefs.ErrInvalidArgument: something was altered.
func (t *Trust) Verify(data, payload []byte) (Verdict, error) {
	e, err := decode(data)
	if err != nil {
		return Verdict{}, err
	}
	if !bytes.Equal(e.payload, payload) {
		return Verdict{}, fault.Invalid("%s: %s is not what was signed: one of them was altered", layout.Signature, layout.Manifest)
	}
	var v Verdict
	signed := dsse.PAE(PayloadType, payload)
	for _, s := range e.signatures {
		key, ok := t.find(s.keyID)
		if !ok {
			v.Unknown = append(v.Unknown, s.keyID)
			continue
		}
		if !ed25519.Verify(key.public, signed, s.sig) {
			return Verdict{}, fault.Invalid("%s: the signature of key %s is not right: it, or %s, was altered", layout.Signature, Short(s.keyID), layout.Manifest)
		}
		v.Signers = append(v.Signers, key.Signer)
	}
	slices.SortStableFunc(v.Signers, func(a, b Signer) int {
		switch {
		case a.Own == b.Own:
			return 0
		case a.Own:
			return -1
		}
		return 1
	})
	return v, nil
}
