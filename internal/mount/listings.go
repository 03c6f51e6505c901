package mount

import (
	"io/fs"
	"slices"
	"sync"
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
	mu sync.Mutex
	// guarded by mu
	dirs  map[string]*listing
	asked map[*question]struct{} // not answered yet
}

// question is a list that somebody has asked for.
type question struct {
	dir string
	old bool // guarded by listings.mu: the directory was changed here meanwhile, and the list may be of before
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

// ask is called before a directory is listed, and answer or giveUp after it.
func (l *listings) ask(dir string) *question {
	q := &question{dir: dir}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.asked == nil {
		l.asked = map[*question]struct{}{}
	}
	l.asked[q] = struct{}{}
	return q
}

func (l *listings) giveUp(q *question) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.asked, q)
}

// answer remembers a whole directory, from now on: a list that has taken longer than cacheTime to come would be of no use else. It returns nil
// for a list that nobody is to rely on.
func (l *listings) answer(q *question, fis []fs.FileInfo) map[string]fs.FileInfo {
	names := make(map[string]fs.FileInfo, len(fis))
	for _, fi := range fis {
		names[fi.Name()] = fi
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.asked, q)
	if q.old {
		return nil
	}
	l.put(q.dir, &listing{at: time.Now(), names: names})
	return names
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
	for _, d := range dirs {
		delete(l.dirs, d)
	}
	for q := range l.asked {
		q.old = q.old || slices.Contains(dirs, q.dir)
	}
}
