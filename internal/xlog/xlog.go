// Package xlog owns how programs log: log/slog text lines to one writer, with a level that can be changed while running.
package xlog

import (
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"time"
)

// EnvLevel names the environment variable that sets the level of every program: error, warn, info (default) or debug.
const EnvLevel = "DOPPEL_LOG_LEVEL"

// Level is a program's level, which can be changed for a time.
type Level struct {
	slog.LevelVar
	base slog.Level

	mu sync.Mutex
	// guarded by mu
	kept slog.Level  // that of the last change without an end, or base: where a change for a time goes back to
	back *time.Timer // ends the change; nil: it has no end, or there is none
}

// SetFor changes the level for a time, after which it is again what it was; 0 is until it is changed again.
func (l *Level) SetFor(to slog.Level, d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.back != nil {
		l.back.Stop()
		l.back = nil
	}
	l.Set(to)
	if d <= 0 {
		l.kept = to
		return
	}
	var back *time.Timer
	back = time.AfterFunc(d, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.back == back { // else it was changed again just then
			l.Set(l.kept)
		}
	})
	l.back = back
}

// Reset goes back to the level that the program was started with.
func (l *Level) Reset() { l.SetFor(l.base, 0) }

// Change is SetFor with a level's name; "" is Reset.
func (l *Level) Change(name string, d time.Duration) error {
	if name == "" {
		l.Reset()
		return nil
	}
	to, err := ParseLevel(name)
	if err == nil {
		l.SetFor(to, d)
	}
	return err
}

// New returns a logger for the named program and its level.
func New(w io.Writer, program string) (*slog.Logger, *Level) {
	l := new(Level)
	if v, err := ParseLevel(os.Getenv(EnvLevel)); err == nil {
		l.base, l.kept = v, v
		l.Set(v)
	}
	h := slog.NewTextHandler(w, &slog.HandlerOptions{Level: l})
	return slog.New(h).With("program", program), l
}

// ParseLevel reads a level's name; the empty string means info.
func ParseLevel(s string) (slog.Level, error) {
	var l slog.Level
	if s == "" {
		return slog.LevelInfo, nil
	}
	if err := l.UnmarshalText([]byte(s)); err != nil {
		return 0, fmt.Errorf("log level %q: want error, warn, info or debug", s)
	}
	return l, nil
}
