package userd

import (
	"path/filepath"
	"strings"
	"sync"

	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/uerr"
)

// points are the mount points that the intercepts of all sessions have. What is mounted or copied there would be another intercept's to remove.
type points struct {
	mu sync.Mutex
	by map[string]string // guarded by mu: the intercept's name, by the directory
}

// take gives an intercept a mount point, until it is freed.
func (p *points) take(point, name string) (free func(), err error) {
	at := resolved(point)
	p.mu.Lock()
	defer p.mu.Unlock()
	if by, taken := p.by[at]; taken {
		return nil, uerr.New(uerr.Conflict, "choose another directory with --mount PATH, or end that one first with: doppel leave "+by, "%s has the volumes of intercept %s", point, by)
	}
	if p.by == nil {
		p.by = map[string]string{}
	}
	p.by[at] = name
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.by, at)
	}, nil
}

// resolved follows the links of a path, of which the end need not be there.
func resolved(path string) string {
	if at, err := filepath.EvalSymlinks(path); err == nil {
		return at
	}
	dir := filepath.Dir(path)
	if dir == path {
		return path
	}
	return filepath.Join(resolved(dir), filepath.Base(path))
}

// point takes the mount point that the user wants for an intercept, or one of ours: if an intercept of the same name has that, in another
// connection, one that has the connection's name too.
func (x *intercepts) point(name, wanted string) (point string, free func(), err error) {
	all := x.s.cfg.points
	if wanted != "" {
		free, err = all.take(wanted, name)
		return wanted, free, err
	}
	point = filepath.Join(localapi.Dir(), "mounts", pointName(name))
	if free, err = all.take(point, name); err != nil {
		point += "@" + pointName(x.s.cfg.name)
		free, err = all.take(point, name)
	}
	return point, free, err
}

// pointName is a name as a file may have it, another one for each. An @ is what stands between two of them.
func pointName(name string) string {
	name = strings.NewReplacer("%", "%25", "/", "%2F", "\x00", "%00", "@", "%40").Replace(name)
	if strings.HasPrefix(name, ".") { // and no . or ..
		name = "%2E" + name[1:]
	}
	return name
}
