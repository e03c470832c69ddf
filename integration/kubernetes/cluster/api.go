package cluster

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
)

// api asks the API server, for waits: a kubectl each time would keep the machine
// busy.
type api struct {
	server string
	client *http.Client
}

func newAPI(server string) api {
	return api{server, &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}}
}

// get decodes the answer into v, unless that is nil.
func (a api) get(ctx context.Context, path string, v any) error {
	return a.do(ctx, http.MethodGet, a.server+path, v)
}

func (a api) do(ctx context.Context, method, url string, v any) error {
	req, err := http.NewRequestWithContext(ctx, method, url, nil)
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+adminToken)
	r, err := a.client.Do(req)
	if err != nil {
		return err
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, url, err)
	}
	if r.StatusCode/100 != 2 {
		return fmt.Errorf("%s %s: %s: %s", method, url, r.Status, bytes.TrimSpace(body))
	}
	if v == nil {
		return nil
	}
	if err := json.Unmarshal(body, v); err != nil {
		return fmt.Errorf("%s %s: %w", method, url, err)
	}
	return nil
}

// A Condition is one of a node's or a pod's.
type Condition struct{ Type, Status, Reason, Message string }

func isTrue(conditions []Condition, kind string) bool {
	for _, c := range conditions {
		if c.Type == kind {
			return c.Status == "True"
		}
	}
	return false
}

// A Pod is what tests look at in a pod.
type Pod struct {
	Metadata struct{ Name, Namespace, UID, DeletionTimestamp string }
	Spec     struct{ NodeName string }
	Status   struct {
		Phase, Reason, Message, PodIP            string
		Conditions                               []Condition
		InitContainerStatuses, ContainerStatuses []ContainerStatus
	}
}

// Ready tells whether the pod is.
func (p *Pod) Ready() bool { return isTrue(p.Status.Conditions, "Ready") }

// Container is the status of one of its containers; a zero one if there is none.
func (p *Pod) Container(name string) ContainerStatus {
	for _, c := range append(p.Status.InitContainerStatuses, p.Status.ContainerStatuses...) {
		if c.Name == name {
			return c
		}
	}
	return ContainerStatus{}
}

// ContainerStatus is a container's status in a Pod.
type ContainerStatus struct {
	Name, ContainerID string
	Ready             bool
	RestartCount      int
	State, LastState  struct {
		Running    *struct{}
		Waiting    *struct{ Reason, Message string }
		Terminated *struct {
			Reason, Message  string
			ExitCode, Signal int
		}
	}
}
