package manager

import (
	"log/slog"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/doppel-dev/doppel/internal/xlog"
)

func TestLevelNow(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for name, tt := range map[string]struct {
		data map[string]string
		want string
	}{
		"nothing":             {nil, ""},
		"without an end":      {map[string]string{"level": "debug"}, "debug"},
		"before its end":      {map[string]string{"level": "debug", "until": "2026-01-02T03:04:06Z"}, "debug"},
		"at its end":          {map[string]string{"level": "debug", "until": "2026-01-02T03:04:05Z"}, ""},
		"an end of nonsense":  {map[string]string{"level": "debug", "until": "soon"}, ""},
		"a level of nonsense": {map[string]string{"level": "loud"}, ""},
	} {
		if got := levelNow(tt.data, now); got != tt.want {
			t.Errorf("%s: %q, want %q", name, got, tt.want)
		}
	}
}

func TestLogging(t *testing.T) {
	w := newWorld(t)
	level, changes := &xlog.Level{}, 0
	l := &logging{client: w.kc, namespace: "doppel", level: level, log: w.cfg.Log, onChange: func() { changes++ }}
	l.look(t.Context()) // there is no ConfigMap
	if l.agents() != "" || changes != 0 {
		t.Errorf("%q, %d changes", l.agents(), changes)
	}
	cm := &corev1.ConfigMap{ObjectMeta: meta("doppel", loggingName), Data: map[string]string{"level": "debug", "until": time.Now().Add(time.Hour).Format(time.RFC3339)}}
	w.create(cm)
	l.look(t.Context())
	l.look(t.Context())
	if l.agents() != "debug" || level.Level() != slog.LevelDebug || changes != 1 {
		t.Errorf("%q, %v, %d changes", l.agents(), level.Level(), changes)
	}
	w.delete(cm)
	l.look(t.Context())
	if l.agents() != "" || level.Level() != slog.LevelInfo || changes != 2 {
		t.Errorf("%q, %v, %d changes", l.agents(), level.Level(), changes)
	}
}
