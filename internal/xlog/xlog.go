// Package xlog owns how programs log: log/slog text lines to one writer, with a level that can be changed while running.
package xlog

import (
	"fmt"
	"io"
	"log/slog"
	"os"
)

// EnvLevel names the environment variable that sets the level of every program: error, warn, info (default) or debug.
const EnvLevel = "DOPPEL_LOG_LEVEL"

// New returns a logger for the named program and the variable that changes its level.
func New(w io.Writer, program string) (*slog.Logger, *slog.LevelVar) {
	lv := new(slog.LevelVar)
	if l, err := ParseLevel(os.Getenv(EnvLevel)); err == nil {
		lv.Set(l)
	}
	h := slog.NewTextHandler(w, &slog.HandlerOptions{Level: lv})
	return slog.New(h).With("program", program), lv
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
