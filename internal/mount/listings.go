package mount

import (
	"io/fs"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// cacheTime is how long what was found of a name is taken for true, here and in the kernel.
	cacheTime = time.Second
	// maxListings bounds the directories of which that is remembered.
	maxListings = 256
)

// listings remembers for cacheTime what directories hold. Whoever looks up a second name of one directory in that time gets the whole of it
// listed: a walk through many files then asks once for each directory and not for each file.
type listings struct {
	changes atomic.Uint64 // made here: a list that was asked for before one is not remembered

	mu sync.Mutex
	// guarded by mu
	dirs map[string]*listing
}

type listing struct {
	at    time.Time
	names map[string]fs.FileInfo // nil: one name was looked up
}

// find returns what is known of a name: known says whether anything is, and list whether it is time to list the directory.
func (l *listings) find(dir, name string) (fi fs.FileInfo, known, list bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	d := l.dirs[dir]
	switch {
	case d == nil || time.Since(d.at) > cacheTime:
		l.put(dir, &listing{at: time.Now()})
		return nil, false, false
	case d.names == nil:
		return nil, false, true
	}
	return d.names[name], true, false
}

// lacks says whether a directory that was listed has no such name.
func (l *listings) lacks(dir, name string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	d := l.dirs[dir]
	return d != nil && d.names != nil && d.names[name] == nil
}

// set remembers a whole directory, as it was asked for after so many changes.
func (l *listings) set(dir string, changes uint64, asked time.Time, fis []fs.FileInfo) {
	names := make(map[string]fs.FileInfo, len(fis))
	for _, fi := range fis {
		names[fi.Name()] = fi
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.changes.Load() == changes {
		l.put(dir, &listing{at: asked, names: names})
	}
}

func (l *listings) put(dir string, d *listing) {
	if l.dirs == nil {
		l.dirs = map[string]*listing{}
	}
	if len(l.dirs) >= maxListings {
		for k, d := range l.dirs {
			if time.Since(d.at) > cacheTime {
				delete(l.dirs, k)
			}
		}
		if len(l.dirs) >= maxListings {
			clear(l.dirs)
		}
	}
	l.dirs[dir] = d
}

// changed forgets directories in which something was changed.
func (l *listings) changed(dirs ...string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.changes.Add(1)
	for _, d := range dirs {
		delete(l.dirs, d)
	}
}
