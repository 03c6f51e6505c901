package mount

import (
	"errors"
	"io/fs"
	"math"
	"sync"
	"syscall"
	"time"
)

const (
	// cacheTime is how long what was found of a name is taken for true, here and in the kernel.
	cacheTime = time.Second
	// maxListings bounds the directories of which that is remembered.
	maxListings = 256
	// maxListed bounds the bytes of what is remembered, about.
	maxListed = 64 << 20
)

// listings remembers for cacheTime what directories hold. Whoever looks up a second name of one directory in that time gets the whole of it
// listed: a walk through many files then asks once for each directory and not for each file. One that is known to be large is listed only after as many
// names as its list takes answers.
type listings struct {
	mu sync.Mutex
	// guarded by mu
	dirs   map[string]*listing
	size   int                  // of dirs
	asked  map[string]*question // not answered yet, by directory
	singly map[string]int       // names of a large directory that are looked up before it is listed again
}

// question is a list that somebody has asked for.
type question struct {
	dir string
	old bool // guarded by listings.mu: the directory was changed here meanwhile, and the list may be of before

	done chan struct{}
	// constant when done
	fis   []fs.FileInfo
	names map[string]fs.FileInfo // nil: nobody is to rely on it
	err   error
}

type listing struct {
	at    time.Time
	size  int
	names map[string]fs.FileInfo // nil: one name was looked up
}

// find returns what is known of a name: known says whether anything is, and list whether it is time to list the directory.
func (l *listings) find(dir, name string) (fi fs.FileInfo, known, list bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	d := l.dirs[dir]
	fresh := d != nil && time.Since(d.at) <= cacheTime
	switch {
	case fresh && d.names != nil:
		return d.names[name], true, false
	case l.singly[dir] > 0:
		l.singly[dir]--
		return nil, false, false
	case !fresh:
		l.put(dir, &listing{at: time.Now()})
	}
	return nil, false, fresh
}

// lacks says whether a directory that was listed has no such name.
func (l *listings) lacks(dir, name string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	d := l.dirs[dir]
	return d != nil && d.names != nil && d.names[name] == nil
}

// ask returns the question for a directory's list that is not answered yet. Unless there was one it is the caller's, to be answered; else old says whether
// its answer is of no use to the caller, who asks again after it.
func (l *listings) ask(dir string) (q *question, mine, old bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if q := l.asked[dir]; q != nil {
		return q, false, q.old
	}
	if l.asked == nil {
		l.asked, l.singly = map[string]*question{}, map[string]int{}
	}
	q = &question{dir: dir, done: make(chan struct{})}
	l.asked[dir] = q
	return q, true, false
}

// answer remembers a whole directory, from now on: a list that has taken longer than cacheTime to come would be of no use else.
func (l *listings) answer(q *question, fis []fs.FileInfo, err error) {
	names, size := make(map[string]fs.FileInfo, len(fis)), 0
	for _, fi := range fis {
		names[fi.Name()] = fi
		size += len(fi.Name()) + 200
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.asked, q.dir)
	defer close(q.done)
	if len(l.singly) >= maxListings {
		clear(l.singly)
	}
	switch more := len(fis)/maxPage - 1; {
	case errors.Is(err, syscall.EFBIG):
		l.singly[q.dir] = math.MaxInt
	case err == nil && more > 0:
		l.singly[q.dir] = more
	case err == nil:
		delete(l.singly, q.dir)
	}
	if q.err = err; err != nil {
		return
	}
	if q.fis = fis; !q.old {
		q.names = names
		l.put(q.dir, &listing{at: time.Now(), size: size, names: names})
	}
}

func (l *listings) put(dir string, d *listing) {
	if l.dirs == nil {
		l.dirs = map[string]*listing{}
	}
	l.drop(dir)
	full := func() bool { return len(l.dirs) >= maxListings || l.size+d.size > maxListed }
	if full() {
		for k, d := range l.dirs {
			if time.Since(d.at) > cacheTime {
				l.drop(k)
			}
		}
		if full() {
			clear(l.dirs)
			l.size = 0
		}
	}
	l.dirs[dir] = d
	l.size += d.size
}

func (l *listings) drop(dir string) {
	if d := l.dirs[dir]; d != nil {
		l.size -= d.size
		delete(l.dirs, dir)
	}
}

// changed forgets directories in which something was changed.
func (l *listings) changed(dirs ...string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, d := range dirs {
		l.drop(d)
		if q := l.asked[d]; q != nil {
			q.old = true
		}
	}
}
