package web

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// followed is a page that is followed for a while, of which there is news as often as it is told.
type followed struct {
	start time.Time

	mu sync.Mutex
	// guarded by mu
	changes uint64 // what is on the page
	news    chan struct{}

	looks int
	said  []time.Duration // since the start: that it has changed
	alive int             // that nothing has
}

// change is a change of the page that is told.
func (f *followed) change() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.changes++
	close(f.news)
	f.news = make(chan struct{})
}

func follow(t *testing.T, during func(f *followed)) *followed {
	t.Helper()
	f := &followed{start: time.Now(), news: make(chan struct{})}
	s := &Site{streams: streams{ended: make(chan struct{})}}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.follow(ctx, func() [3]<-chan struct{} {
			f.mu.Lock()
			defer f.mu.Unlock()
			return [3]<-chan struct{}{f.news}
		}, func() (sum [sha256.Size]byte, ok bool) {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.looks++
			binary.BigEndian.PutUint64(sum[:], f.changes+1)
			return sum, true
		}, func(what string) bool {
			if what == "data: changed\n\n" {
				f.said = append(f.said, time.Since(f.start))
			} else {
				f.alive++
			}
			return true
		})
	}()
	synctest.Wait()
	during(f)
	cancel()
	<-done
	return f
}

// A page of which there is news all the time is made anew, and told of, once a second and no more; the last change is told, too.
func TestLiveBound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const lasts, every = time.Minute, 2 * time.Millisecond // 500 visitors a second
		f := follow(t, func(f *followed) {
			for range int(lasts / every) {
				time.Sleep(every)
				synctest.Wait()
				f.change()
			}
			time.Sleep(2 * liveEvery)
			synctest.Wait()
		})
		if n := int(lasts/liveEvery) + 2; len(f.said) > n || len(f.said) < n-2 || f.looks > n+1 {
			t.Errorf("%d times said, %d looks in %v of news", len(f.said), f.looks, lasts)
		}
		for i := 1; i < len(f.said); i++ {
			if d := f.said[i] - f.said[i-1]; d < liveEvery {
				t.Errorf("two after %v", d)
			}
		}
		if last := f.said[len(f.said)-1]; last < lasts {
			t.Errorf("the last change, at %v, was not told; the last that was at %v", lasts, last)
		}
	})
}

// A change after a quiet time is told at once, and a quiet page is looked after now and then.
func TestLiveQuiet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := follow(t, func(f *followed) {
			time.Sleep(30 * time.Second)
			synctest.Wait()
			f.change()
			synctest.Wait()
		})
		if want := []time.Duration{0, 30 * time.Second}; !slices.Equal(f.said, want) || f.alive != 2 {
			t.Errorf("said at %v, want %v; %d signs of life", f.said, want, f.alive)
		}
	})
}
