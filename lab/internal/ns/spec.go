// Package ns makes sets of namespaces, each held by an init process whose end ends everything inside, and runs commands
// in them.
package ns

import "github.com/doppel-dev/doppel/lab/internal/state"

// Spec is what a holder sets up inside its namespaces before it reports that it is ready.
type Spec struct {
	Hostname string `json:"hostname"`
	// Hide are directories that get an empty, private file system in the place of the machine's.
	Hide []string `json:"hide"`
	// Overlay are directories whose changes stay private.
	Overlay []string `json:"overlay"`
	// Binds are done after Hide and Overlay, with the sources as they were before.
	Binds []Bind `json:"binds"`
	// Shared makes mounts propagate to the containers inside, as kubelet wants it.
	Shared bool `json:"shared"`
	// Shadow covers files, such as kernel settings, with private ones of the given content.
	Shadow map[string]string `json:"shadow"`
	// Remove and Files are done last; a path in Remove may be missing.
	Remove []string `json:"remove"`
	Files  []File   `json:"files"`
	// Role is what the holder does besides reaping: "" or the name of a server that the program knows.
	Role    string `json:"role"`
	RoleArg string `json:"roleArg"`
}

// Bind mounts From, a directory or a file, on To, which is made if it is missing.
type Bind struct {
	From string `json:"from"`
	To   string `json:"to"`
}

// File is a file or, if Dir is set, a directory that the holder writes.
type File struct {
	Path    string `json:"path"`
	Content string `json:"content"`
	Mode    uint32 `json:"mode"`
	UID     int    `json:"uid"`
	Dir     bool   `json:"dir"`
}

// procPath is a path under /proc of a process, as the machine sees it.
func procPath(p state.Process, elem string) string {
	return "/proc/" + itoa(p.PID) + "/" + elem
}
