package lifecycle

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// logged is a logger and what it wrote.
type logged struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func newGroup(ctx context.Context) (*Group, *logged) {
	l := &logged{}
	return New(ctx, slog.New(slog.NewTextHandler(l, nil))), l
}

// until is a goroutine that ends with its context.
func until(ctx context.Context) error {
	<-ctx.Done()
	return ctx.Err()
}

func TestFirstFailureStopsAll(t *testing.T) {
	boom := errors.New("boom")
	for name, fail := range map[string]error{
		"an error":                boom,
		"somebody else's context": fmt.Errorf("watch: %w", context.Canceled), // is no end of ours
		"somebody else's stop":    ErrStopped,
		"somebody else's timeout": context.DeadlineExceeded,
	} {
		t.Run(name, func(t *testing.T) {
			g, log := newGroup(t.Context())
			g.Go("waits", until)
			g.Go("fails", func(context.Context) error { return fail })
			g.Go("waits too", until)
			err := g.Wait()
			if !errors.Is(err, fail) || err.Error() != "fails: "+fail.Error() {
				t.Errorf("got %v", err)
			}
			if !errors.Is(context.Cause(g.Context()), fail) {
				t.Errorf("cause %v", context.Cause(g.Context()))
			}
			if got := log.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, "goroutine=fails") {
				t.Errorf("logged %q", got)
			}
		})
	}
}

func TestPanicIsAnError(t *testing.T) {
	g, log := newGroup(t.Context())
	g.Go("waits", until)
	g.Go("panics", func(context.Context) error { panic("the sky is falling") })
	err := g.Wait()
	if err == nil || !strings.Contains(err.Error(), "panics: panic: the sky is falling") || !strings.Contains(err.Error(), "lifecycle_test.go") {
		t.Errorf("got %v", err)
	}
	if !strings.Contains(log.String(), "the sky is falling") {
		t.Error("not logged")
	}
}

// A panic on the way out is a defect like any other.
func TestPanicAfterTheEndIsLogged(t *testing.T) {
	g, log := newGroup(t.Context())
	g.Go("panics late", func(ctx context.Context) error {
		<-ctx.Done()
		panic("late")
	})
	g.Go("fails late", func(ctx context.Context) error {
		<-ctx.Done()
		return io.EOF
	})
	g.Stop()
	if err := g.Wait(); err != nil {
		t.Errorf("got %v", err)
	}
	if got := log.String(); !strings.Contains(got, "panic: late") || strings.Contains(got, "EOF") {
		t.Errorf("logged %q", got)
	}
}

func TestEnds(t *testing.T) {
	boom := errors.New("boom")
	for name, tt := range map[string]struct {
		end  func(*Group, context.CancelCauseFunc)
		want error
	}{
		"stopped":              {func(g *Group, _ context.CancelCauseFunc) { g.Stop() }, nil},
		"parent canceled":      {func(_ *Group, c context.CancelCauseFunc) { c(nil) }, nil},
		"parent ended, reason": {func(_ *Group, c context.CancelCauseFunc) { c(boom) }, nil}, // a signal, for one
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancelCause(t.Context())
			g, log := newGroup(ctx)
			g.Go("waits", until)
			tt.end(g, cancel)
			if err := g.Wait(); !errors.Is(err, tt.want) || (err == nil) != (tt.want == nil) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
			if log.String() != "" {
				t.Errorf("logged %q", log.String())
			}
			cancel(nil)
		})
	}
	g, _ := newGroup(t.Context())
	if err := g.Wait(); err != nil {
		t.Errorf("an empty group: %v", err)
	}
	g.Stop()
}

// Nobody returns before all have ended, also those that take their time.
func TestWaitWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, _ := newGroup(context.Background())
		var mu sync.Mutex
		ended := 0
		for range 3 {
			g.Go("slow", func(ctx context.Context) error {
				<-ctx.Done()
				time.Sleep(time.Minute) // cleaning up
				mu.Lock()
				ended++
				mu.Unlock()
				return nil
			})
			time.Sleep(time.Second)
		}
		g.Go("starts another", func(context.Context) error {
			g.Go("late", until)
			return errors.New("and fails")
		})
		begin := time.Now()
		if err := g.Wait(); err == nil {
			t.Error("no error")
		}
		if d := time.Since(begin); ended != 3 || d != time.Minute {
			t.Errorf("%d had ended after %s", ended, d)
		}
	})
}
