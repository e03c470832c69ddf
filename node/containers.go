package node

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/errdefs"

	"github.com/stasis-run/stasis/checkpoint/capture"
)

// Container is a container in containerd.
type Container struct {
	ID string
	// Name is Kubernetes' name of it; else its ID.
	Name    string
	Pod     *capture.Pod // nil: it is in none
	Image   string
	Runtime string
	// Status is containerd's: "running", "paused", "stopped", "created"; empty: it has no
	// task.
	Status  string
	Pid     uint32 // of its main process; 0: it has no task
	Created time.Time
	Labels  map[string]string
}

// Containers lists the containers in containerd's namespace, by their IDs.
func (n *Node) Containers(ctx context.Context) ([]Container, error) {
	c, err := n.Client(ctx)
	if err != nil {
		return nil, err
	}
	found, err := c.Containers(ctx)
	if err != nil {
		return nil, fmt.Errorf("list containers: %w", err)
	}
	all := []Container{}
	for _, container := range found {
		one, err := describeContainer(ctx, container)
		if errdefs.IsNotFound(err) {
			continue // it was removed meanwhile
		}
		if err != nil {
			return nil, fmt.Errorf("look at container %s: %w", container.ID(), err)
		}
		all = append(all, *one)
	}
	slices.SortFunc(all, func(a, b Container) int { return strings.Compare(a.ID, b.ID) })
	return all, nil
}

func describeContainer(ctx context.Context, container client.Container) (*Container, error) {
	info, err := container.Info(ctx, client.WithoutRefreshedMetadata)
	if err != nil {
		return nil, err
	}
	one := &Container{ID: info.ID, Name: info.ID, Image: info.Image, Runtime: info.Runtime.Name, Created: info.CreatedAt, Labels: info.Labels}
	if name := info.Labels[labelContainerName]; name != "" {
		one.Name = name
	}
	one.Pod = podOf(info)
	task, err := container.Task(ctx, nil)
	if errdefs.IsNotFound(err) {
		return one, nil
	}
	if err != nil {
		return nil, err
	}
	one.Pid = task.Pid()
	status, err := task.Status(ctx)
	if errdefs.IsNotFound(err) {
		return one, nil
	}
	one.Status = string(status.Status)
	return one, err
}
