package xlog

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
)

func TestLevels(t *testing.T) {
	for s, want := range map[string]slog.Level{"": slog.LevelInfo, "debug": slog.LevelDebug, "INFO": slog.LevelInfo, "warn": slog.LevelWarn, "error": slog.LevelError} {
		if got, err := ParseLevel(s); err != nil || got != want {
			t.Errorf("%q: %v, %v", s, got, err)
		}
	}
	if _, err := ParseLevel("loud"); err == nil || !strings.Contains(err.Error(), "want error, warn, info or debug") {
		t.Errorf("got %v", err)
	}
}

func TestNew(t *testing.T) {
	for env, want := range map[string]slog.Level{"": slog.LevelInfo, "debug": slog.LevelDebug, "nonsense": slog.LevelInfo} {
		t.Setenv(EnvLevel, env)
		var out bytes.Buffer
		log, level := New(&out, "prog")
		if level.Level() != want {
			t.Errorf("%q: level %v, want %v", env, level.Level(), want)
		}
		level.Set(slog.LevelWarn) // while running
		log.Info("quiet")
		log.Warn("loud", "key", "value")
		if got := out.String(); !strings.Contains(got, "level=WARN msg=loud program=prog key=value\n") || strings.Contains(got, "quiet") {
			t.Errorf("%q: %s", env, got)
		}
	}
}
