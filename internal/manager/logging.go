package manager

import (
	"context"
	"log/slog"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/doppel-dev/doppel/internal/xlog"
)

// loggingName is the ConfigMap that changes log levels; who may write it is RBAC's matter.
const loggingName = objectName + "-logging"

// Keys of that ConfigMap.
const (
	loggingLevel = "level" // error, warn, info or debug
	loggingUntil = "until" // RFC 3339; without it the level stays until it is changed
)

// loggingInterval is how often the ConfigMap is looked at.
const loggingInterval = 5 * time.Second

// logging follows the ConfigMap: the manager's own level, and the one that agents are told.
type logging struct {
	client    client.Reader
	namespace string
	level     *xlog.Level
	log       *slog.Logger
	onChange  func()

	mu sync.Mutex
	// guarded by mu
	current string // "" is what each program was started with
}

func (l *logging) run(ctx context.Context) error {
	tick := time.NewTicker(loggingInterval)
	defer tick.Stop()
	for {
		l.look(ctx)
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// look puts in force what the ConfigMap says now.
func (l *logging) look(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, loggingInterval)
	defer cancel()
	var cm corev1.ConfigMap
	err := l.client.Get(ctx, client.ObjectKey{Namespace: l.namespace, Name: loggingName}, &cm)
	if err != nil && !apierrors.IsNotFound(err) {
		l.log.Debug("log level not read", "err", err)
		return
	}
	want := levelNow(cm.Data, time.Now())
	l.mu.Lock()
	changed := want != l.current
	l.current = want
	l.mu.Unlock()
	if !changed {
		return
	}
	l.log.Info("log level changed", "loglevel", want)
	if l.level != nil {
		if err := l.level.Change(want, 0); err != nil { // levelNow has read it
			l.log.Warn("log level not changed", "err", err)
		}
	}
	l.onChange()
}

// levelNow is the level that the ConfigMap asks for at a moment; "" is none. What cannot be read asks for nothing.
func levelNow(data map[string]string, now time.Time) string {
	level := data[loggingLevel]
	if _, err := xlog.ParseLevel(level); err != nil {
		return ""
	}
	if until := data[loggingUntil]; until != "" {
		if t, err := time.Parse(time.RFC3339, until); err != nil || !now.Before(t) {
			return ""
		}
	}
	return level
}

// agents is the level that agents are told.
func (l *logging) agents() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.current
}
