// Package api is the interface of the shim's own service, beside containerd's Task
// service: checkpoint.proto, and the code that is generated from it.
//
// To generate it again takes protoc 3.21.12, protoc-gen-go of the module
// google.golang.org/protobuf, and cmd/protoc-gen-go-ttrpc of the module
// github.com/containerd/ttrpc, both at the version in go.mod.
package api

//go:generate protoc --go_out=. --go_opt=paths=source_relative --go-ttrpc_out=. --go-ttrpc_opt=paths=source_relative checkpoint.proto
