// Command traffic-agent is the sidecar that decides per connection whether the app or a laptop answers.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/doppel-dev/doppel/internal/agent"
	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/footprint"
	"github.com/doppel-dev/doppel/internal/redirect"
	"github.com/doppel-dev/doppel/internal/sched"
	"github.com/doppel-dev/doppel/internal/xlog"
)

func main() {
	log, level := xlog.New(os.Stderr, "traffic-agent")
	if err := run(log, level, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "traffic-agent: error:", err)
		os.Exit(1)
	}
}

// run is the agent, or with an argument: "redirect", the init container that sets the pod's nftables rules and exits, or "stand-in", which does
// nothing in the place of a container until it is told to end.
func run(log *slog.Logger, level *xlog.Level, args []string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if len(args) > 0 && args[0] == "stand-in" {
		<-ctx.Done()
		return nil
	}
	cfg, err := agentcfg.Parse(os.Getenv(agentcfg.EnvConfig))
	if err != nil {
		return err
	}
	if len(args) > 0 && args[0] == "redirect" {
		return redirect.Apply(redirect.Rules(cfg))
	}
	env, err := agent.Environ()
	if err != nil {
		return err
	}
	go footprint.Keep(ctx)
	sched.Batch(log)
	a, err := agent.New(agent.Config{
		Agent:     cfg,
		Pod:       os.Getenv(agentcfg.EnvPodName),
		Namespace: os.Getenv(agentcfg.EnvPodNamespace),
		PodIP:     os.Getenv(agentcfg.EnvPodIP),
		Environ:   env,
		Token: func() (string, error) {
			b, err := os.ReadFile(agentcfg.TokenFile)
			return strings.TrimSpace(string(b)), err
		},
		Log: log, Level: level,
	})
	if err != nil {
		return err
	}
	return a.Run(ctx)
}
