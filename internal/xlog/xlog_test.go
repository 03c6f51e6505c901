package xlog

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"
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

func TestSetFor(t *testing.T) {
	t.Setenv(EnvLevel, "warn")
	synctest.Test(t, func(t *testing.T) {
		_, l := New(&bytes.Buffer{}, "prog")
		l.SetFor(slog.LevelDebug, time.Minute)
		time.Sleep(59 * time.Second)
		if l.Level() != slog.LevelDebug {
			t.Errorf("before its end: %v", l.Level())
		}
		l.SetFor(slog.LevelError, time.Minute) // takes the first change's place, its end too
		time.Sleep(59 * time.Second)
		if l.Level() != slog.LevelError {
			t.Errorf("the second change: %v", l.Level())
		}
		time.Sleep(2 * time.Second)
		if l.Level() != slog.LevelWarn {
			t.Errorf("after its end: %v", l.Level())
		}
		l.SetFor(slog.LevelInfo, 0)
		time.Sleep(time.Hour)
		if l.Level() != slog.LevelInfo {
			t.Errorf("without an end: %v", l.Level())
		}
		l.SetFor(slog.LevelDebug, time.Minute)
		time.Sleep(2 * time.Minute)
		if l.Level() != slog.LevelInfo {
			t.Errorf("for a time, after one without an end: %v", l.Level())
		}
		if l.Reset(); l.Level() != slog.LevelWarn {
			t.Errorf("as started: %v", l.Level())
		}
	})
}
