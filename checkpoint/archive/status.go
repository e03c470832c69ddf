package archive

import "github.com/stasis-run/stasis/checkpoint/capture"

// status is what containerd's CRI, from 2.1 to 2.3, reads of status.dump when it
// restores: parts of CRI's ContainerStatus, in the JSON of its Go types.
type status struct {
	ID       string `json:"id"`
	Metadata struct {
		Name string `json:"name"`
	} `json:"metadata"`
	CreatedAt int64 `json:"created_at,omitempty"` // nanoseconds
	Image     struct {
		Image string `json:"image,omitempty"`
		User  string `json:"user_specified_image,omitempty"`
	} `json:"image"`
	ImageRef string            `json:"image_ref,omitempty"`
	Labels   map[string]string `json:"labels,omitempty"`
}

func newStatus(i capture.Info) status {
	var s status
	s.ID = i.ContainerID
	s.Metadata.Name = i.ContainerName
	if !i.Created.IsZero() {
		s.CreatedAt = i.Created.UnixNano()
	}
	s.Image.Image, s.Image.User = i.Base.Name, i.Base.Name
	s.ImageRef = i.Base.Config
	s.Labels = i.Labels
	return s
}
