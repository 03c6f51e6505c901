package preview

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"testing"
	"testing/synctest"
	"time"
)

// stuck is a visitor who does not read: writing to it hangs until its deadline.
type stuck struct {
	*httptest.ResponseRecorder
	over chan struct{} // closed at the deadline
}

func (s *stuck) Write([]byte) (int, error) {
	<-s.over
	return 0, context.DeadlineExceeded
}

func (s *stuck) FlushError() error {
	<-s.over
	return context.DeadlineExceeded
}

func (s *stuck) SetReadDeadline(time.Time) error { return nil }

func (s *stuck) SetWriteDeadline(t time.Time) error {
	if t.Before(time.Now()) {
		close(s.over)
	}
	return nil
}

// A visitor who does not read is cut after a while, and not one whose app is silent for longer.
func TestSlow(t *testing.T) {
	for name, write := range map[string]func(http.ResponseWriter) error{
		"write": func(w http.ResponseWriter) error { _, err := w.Write([]byte("x")); return err },
		"flush": func(w http.ResponseWriter) error { return http.NewResponseController(w).Flush() },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cut := context.WithCancelCause(t.Context())
				w := &stuck{httptest.NewRecorder(), make(chan struct{})}
				stop := endWith(ctx, w)
				r := &recorder{ResponseWriter: w, slow: newSlow(func() { cut(errSlow) })}
				time.Sleep(2 * slowTimeout)
				if ctx.Err() != nil {
					t.Error("cut while nothing was written")
				}
				if err := write(r); !errors.Is(err, context.DeadlineExceeded) || !errors.Is(context.Cause(ctx), errSlow) {
					t.Error(err, context.Cause(ctx))
				}
				stop()
			})
		})
	}
}
