package main

import (
	"log/slog"
	"strings"
	"testing"

	"github.com/doppel-dev/doppel/internal/agentcfg"
)

// What is wrong with the pod's environment is said before anything is touched.
func TestRunRefuses(t *testing.T) {
	valid := (&agentcfg.Config{Managers: []string{"m:1"}, ManagerKey: "k", HealthPort: 9900}).String()
	for name, tt := range map[string]struct {
		config string
		args   []string
		want   string
	}{
		"no configuration":          {"", nil, "agent configuration"},
		"redirect without it":       {"", []string{"redirect"}, "agent configuration"},
		"not valid":                 {"{}", nil, "managers and managerKey are required"},
		"no pod in the environment": {valid, nil, "incomplete configuration"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv(agentcfg.EnvConfig, tt.config)
			t.Setenv(agentcfg.EnvPodName, "")
			if err := run(slog.New(slog.DiscardHandler), nil, tt.args); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}
