package shim

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os/exec"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/log"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// runtimeName is what a container's record calls this runtime.
const runtimeName = "io.containerd.stasis.v1"

// featuresType is how containerd calls the output of `runc features`, which it
// reads as JSON.
const featuresType = "types.containerd.io/opencontainers/runtime-spec/1/features/Features"

// printInfo answers -info: options on stdin, a RuntimeInfo on stdout.
func printInfo(ctx context.Context, stdin io.Reader, stdout io.Writer, build Build, rt Runtime) error {
	input, err := readAll(stdin)
	if err != nil {
		return err
	}
	info := &types.RuntimeInfo{
		Name:    runtimeName,
		Version: &types.RuntimeVersion{Version: build.Version, Revision: build.Commit},
	}
	binary := "runc"
	if len(input) > 0 {
		info.Options = &anypb.Any{}
		if err := proto.Unmarshal(input, info.Options); err != nil {
			return fmt.Errorf("standard input does not hold runtime options: %w", err)
		}
		opts, err := rt.DecodeOptions(info.Options)
		if err != nil {
			return fmt.Errorf("decode runtime options: %w", err)
		}
		if name := opts.GetBinaryName(); name != "" {
			binary = name
		}
	}
	// Not every OCI runtime can tell, and the rest of the info is as true.
	if f, err := features(ctx, binary); err != nil {
		log.G(ctx).WithError(err).Warn("the OCI runtime does not tell its features")
	} else {
		info.Features = &anypb.Any{TypeUrl: featuresType, Value: f}
	}
	data, err := proto.Marshal(info)
	if err != nil {
		return fmt.Errorf("encode the answer: %w", err)
	}
	_, err = stdout.Write(data)
	return err
}

// features returns what `runc features` prints.
func features(ctx context.Context, binary string) ([]byte, error) {
	var stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, binary, "features")
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s features: %w: %s", binary, err, bytes.TrimSpace(stderr.Bytes()))
	}
	out = bytes.TrimSpace(out)
	if !json.Valid(out) {
		return nil, fmt.Errorf("%s features: not JSON", binary)
	}
	return out, nil
}
