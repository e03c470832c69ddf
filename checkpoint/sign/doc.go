// Package sign says who made a checkpoint. It signs the bytes of a manifest with
// Ed25519, in a DSSE envelope (https://github.com/secure-systems-lab/dsse), and
// verifies such envelopes.
//
// A node's keys lie in one folder, which is root's:
//
//	keys/sign.key  the private key that the node signs with, PKCS#8 in PEM, mode 0600
//	trusted/*.pub  public keys that it trusts besides, PKIX in PEM
//
//	key, err := sign.DefaultDir().Key() // made if there is none
//	envelope, err := key.Sign(manifest, nil)
//
//	trust, err := sign.DefaultDir().Trust()
//	verdict, err := trust.Verify(envelope, manifest)
//
// A signature says who made something, and grants nothing.
package sign

// PayloadType is what is signed: the bytes of stasis.json. It is part of what the
// signature is of, so a signature of something else is none of a checkpoint.
const PayloadType = "application/vnd.stasis.checkpoint+json;version=3"
