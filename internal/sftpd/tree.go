package sftpd

import (
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"
	"time"
)

// Export is one volume mount of an app.
type Export struct {
	// Path is where the app has it, absolute and clean.
	Path string
	// Dir is where this process has it: a directory, or a file where the app mounts a single one.
	Dir string
	// ReadOnly refuses whatever would change it.
	ReadOnly bool
}

// volume is an opened Export.
type volume struct {
	Export
	root *os.Root // of a directory
	err  error    // why it could not be opened: this process may not read what belongs to another user. The other volumes are served all the same
}

func openVolume(e Export) *volume {
	v := &volume{Export: e}
	fi, err := os.Stat(e.Dir)
	if err == nil && fi.IsDir() {
		v.root, err = os.OpenRoot(e.Dir)
	}
	v.err = err
	return v
}

// tree is the file system that is served: the volumes where the app has them, and the directories that lead to them. It has no place
// outside the volumes that could be written or read, and every name within one is looked up below its os.Root.
type tree struct {
	volumes []*volume // the longer paths first
}

// place is what a path leads to: a name in a volume, or a directory above volumes (vol is nil).
type place struct {
	vol *volume
	rel string // relative to the volume; "." is its root
}

// top says that the place is the root of a volume, or above.
func (p place) top() bool { return p.vol == nil || p.rel == "." }

// find says where an absolute, clean path leads.
func (t *tree) find(p string) (place, error) {
	if len(p) >= 4096 { // PATH_MAX; path_resolution(7)
		return place{}, syscall.ENAMETOOLONG
	}
	for _, v := range t.volumes {
		if rel, ok := below(v.Path, p); ok {
			if v.err != nil {
				return place{v, rel}, bare(v.err)
			}
			if v.root == nil && rel != "." {
				return place{}, syscall.ENOTDIR
			}
			return place{v, rel}, nil
		}
	}
	if len(t.children(p)) == 0 && p != "/" {
		return place{}, syscall.ENOENT
	}
	return place{rel: "."}, nil
}

// look is find for who only reads. In a volume that the kubelet writes, which is read-only, whoever was led to what is no more is led to the newest.
func (t *tree) look(p string) (place, error) {
	at, err := t.find(p)
	if err == nil && at.vol != nil && at.vol.root != nil && at.vol.ReadOnly {
		at.rel = at.vol.newest(at.rel)
	}
	return at, err
}

// newest is where a name leads that was found in earlier contents of a ConfigMap, Secret or another volume that the kubelet writes: as a whole, each
// time in a new directory, to which it has the link ..data lead (AtomicWriter in pkg/volume/util of Kubernetes; all names that begin with ".." are
// its own). The client has names and open files in the directory of before, which is gone after an update, and which the next pod never had.
func (v *volume) newest(rel string) string {
	dir, rest, _ := strings.Cut(rel, "/")
	if !strings.HasPrefix(dir, "..") {
		return rel
	}
	if _, err := v.root.Lstat(rel); !os.IsNotExist(err) {
		return rel
	}
	to, err := v.root.Readlink("..data")
	if err != nil || !strings.HasPrefix(to, "..") || strings.Contains(to, "/") {
		return rel
	}
	return path.Join(to, rest)
}

// children are the names in a directory that lead to volumes deeper down.
func (t *tree) children(dir string) []string {
	var names []string
	for _, v := range t.volumes {
		if rel, ok := below(dir, v.Path); ok && rel != "." {
			name, _, _ := strings.Cut(rel, "/")
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// below returns the way from dir to p, if p is dir or in it.
func below(dir, p string) (string, bool) {
	switch {
	case p == dir:
		return ".", true
	case dir == "/":
		return p[1:], true
	case strings.HasPrefix(p, dir) && p[len(dir)] == '/':
		return p[len(dir)+1:], true
	}
	return "", false
}

// stat returns what is at a path; follow has the last symbolic link followed, as far as it stays in its volume.
func (t *tree) stat(p string, follow bool) (fs.FileInfo, error) {
	at, err := t.look(p)
	if err != nil {
		if at.vol != nil && at.top() { // the app has it, so it is in lists
			return closed{directory(path.Base(p))}, nil
		}
		return nil, err
	}
	if at.vol == nil {
		return directory(path.Base(p)), nil
	}
	if at.vol.root == nil {
		fi, err := os.Stat(at.vol.Dir)
		if err != nil {
			return nil, err
		}
		return named{fi, path.Base(p)}, nil
	}
	stat := at.vol.root.Lstat
	if follow {
		stat = at.vol.root.Stat
	}
	fi, err := stat(at.rel)
	if os.IsNotExist(err) && len(t.children(p)) > 0 { // a mount point in a volume that nobody made a directory for
		return directory(path.Base(p)), nil
	}
	if err == nil && at.rel == "." {
		fi = named{fi, path.Base(p)}
	}
	return fi, err
}

// directory is a directory above volumes.
type directory string

func (d directory) Name() string     { return string(d) }
func (directory) Size() int64        { return 0 }
func (directory) Mode() fs.FileMode  { return fs.ModeDir | 0o555 }
func (directory) ModTime() time.Time { return time.Unix(0, 0) }
func (directory) IsDir() bool        { return true }
func (directory) Sys() any           { return nil }

// closed is a volume that could not be opened.
type closed struct{ directory }

func (closed) Mode() fs.FileMode { return fs.ModeDir }

// named is the root of a volume under the name that the app has it under.
type named struct {
	fs.FileInfo
	name string
}

func (n named) Name() string { return n.name }
