// Package state keeps what a lab must remember between two commands: its directory, its record and its locks.
package state

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/doppel-dev/doppel/lab/internal/plan"
	"github.com/doppel-dev/doppel/lab/internal/relay"
)

// Root is where the labs of a machine keep their state.
const Root = "/var/lib/doppel-lab"

// Process identifies a process beyond the reuse of its id.
type Process struct {
	PID int `json:"pid"`
	// Start is the start time in clock ticks since boot, field 22 of /proc/PID/stat.
	Start uint64 `json:"start"`
}

// Laptop is one laptop of a lab.
type Laptop struct {
	Index  int     `json:"index"`
	Holder Process `json:"holder"`
	Link   Link    `json:"link"`
}

// Link is how the link of a laptop is; the zero value is a perfect one.
type Link struct {
	Down  bool          `json:"down,omitempty"`
	Delay time.Duration `json:"delay,omitempty"`
	Loss  float64       `json:"loss,omitempty"`
}

// Line is what a relay is to do.
func (l Link) Line() relay.Config { return relay.Config{Delay: l.Delay, Loss: l.Loss} }

// Relayed says whether packets go through a relay instead of the kernel alone.
func (l Link) Relayed() bool { return l.Line() != relay.Config{} }

// Lab is the record of one lab. Its holders are the init processes of its namespaces: the end of a holder ends
// everything inside.
type Lab struct {
	Plan    plan.Lab           `json:"plan"`
	Ready   bool               `json:"ready"`
	Wan     Process            `json:"wan"`
	Nodes   map[string]Process `json:"nodes"`
	Servers map[string]Server  `json:"servers"`
	Laptops map[string]Laptop  `json:"laptops"`
	Version string             `json:"version"`
	dir     string
}

// Server is a server process of the lab, with its id as seen inside the namespace of its node.
type Server struct {
	Node    string  `json:"node"`
	Process Process `json:"process"`
	// Argv is what it was started with, and is started again with.
	Argv []string `json:"argv"`
}

// Dir is the directory of the named lab.
func Dir(name string) string { return filepath.Join(Root, name) }

// Path joins elements to the directory of the lab.
func (l *Lab) Path(elem ...string) string {
	return filepath.Join(append([]string{l.dir}, elem...)...)
}

// New returns the record of a lab that does not exist yet.
func New(p plan.Lab) *Lab {
	return &Lab{
		Plan: p, dir: Dir(p.Name),
		Nodes: map[string]Process{}, Servers: map[string]Server{}, Laptops: map[string]Laptop{},
	}
}

// Load reads the record of the named lab; the error is fs.ErrNotExist if there is none.
func Load(name string) (*Lab, error) {
	b, err := os.ReadFile(filepath.Join(Dir(name), "lab.json"))
	if err != nil {
		return nil, err
	}
	l := New(plan.Lab{Name: name})
	if err := json.Unmarshal(b, l); err != nil {
		return nil, fmt.Errorf("read the record of lab %s: %w", name, err)
	}
	return l, nil
}

// Save writes the record, whole or not at all.
func (l *Lab) Save() error {
	b, err := json.MarshalIndent(l, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(l.dir, 0o755); err != nil {
		return err
	}
	return WriteFile(l.Path("lab.json"), b, 0o600)
}

// WriteFile writes a file by renaming, so that a reader sees the old content or the new.
func WriteFile(path string, b []byte, mode fs.FileMode) error {
	tmp, err := os.CreateTemp(filepath.Dir(path), ".tmp-*")
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(tmp.Name()) }()
	_, err = tmp.Write(b)
	err = errors.Join(err, tmp.Chmod(mode), tmp.Close())
	if err != nil {
		return err
	}
	return os.Rename(tmp.Name(), path)
}

// Names lists the labs that have a directory, in order.
func Names() ([]string, error) {
	entries, err := os.ReadDir(Root)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() && plan.CheckName(e.Name()) == nil {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// FreeIndex returns the lowest index that neither another lab nor taken holds. The caller holds the root lock.
func FreeIndex(taken func(plan.Lab) bool) (int, error) {
	names, err := Names()
	if err != nil {
		return 0, err
	}
	var used []int
	for _, n := range names {
		if l, err := Load(n); err == nil {
			used = append(used, l.Plan.Index)
		}
	}
	for i := range plan.MaxIndex + 1 {
		if !slices.Contains(used, i) && !taken(plan.Lab{Index: i}) {
			return i, nil
		}
	}
	return 0, errors.New("no subnet is left for another lab: take one down with lab down --name NAME, or end what has routes into 10.77.0.0/16 (see: ip route)")
}

func lockPath(name string) string { return filepath.Join(Root, "."+name+".lock") }

// Lock takes the lock of the named lab, or of the machine if name is empty, and returns the function that gives it back.
// The files are beside the labs' directories, so that a lab can be removed under its lock.
func Lock(name string) (unlock func(), err error) {
	for {
		if err := os.MkdirAll(Root, 0o755); err != nil {
			return nil, err
		}
		f, err := os.OpenFile(lockPath(name), os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o600)
		if errors.Is(err, fs.ErrNotExist) {
			continue // the last lab went away between the two calls
		}
		if err != nil {
			return nil, err
		}
		if err := flock(f); err != nil {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
		}
		if current(f) {
			return func() { f.Close() }, nil
		}
		f.Close() // whoever held it has removed it: take the new one
	}
}

func flock(f *os.File) error {
	for {
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// current says whether the path of f still leads to f.
func current(f *os.File) bool {
	held, err := f.Stat()
	if err != nil {
		return false
	}
	now, err := os.Stat(f.Name())
	return err == nil && os.SameFile(held, now)
}

// Forget removes the lock file of a lab that is gone, and the root directory after the last lab. The caller holds the
// lock of the machine and the lab's.
func Forget(name string) error {
	if err := os.Remove(lockPath(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	entries, err := os.ReadDir(Root)
	if err != nil {
		return err
	}
	if len(entries) == 1 && entries[0].Name() == filepath.Base(lockPath("")) {
		return os.RemoveAll(Root)
	}
	return nil
}
