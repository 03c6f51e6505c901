package resolver

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"
)

// TestPause: a listener that fails waits longer each time, for at most a second, and not beyond the server's end.
func TestPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(Config{Log: slog.New(slog.DiscardHandler)})
		for _, tt := range []struct {
			failures int
			want     time.Duration
		}{
			{1, time.Millisecond},
			{2, 2 * time.Millisecond},
			{10, 512 * time.Millisecond},
			{11, time.Second},
			{1 << 30, time.Second},
		} {
			begin := time.Now()
			s.pause(t.Context(), "tcp", tt.failures, errors.New("broken"))
			if d := time.Since(begin); d != tt.want {
				t.Errorf("%v after %d failures, want %v", d, tt.failures, tt.want)
			}
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		begin := time.Now()
		s.pause(ctx, "tcp", 100, errors.New("broken"))
		if d := time.Since(begin); d != time.Millisecond {
			t.Errorf("%v, and the server had ended after 1 ms", d)
		}
	})
}
