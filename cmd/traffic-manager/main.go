// Command traffic-manager is doppel's one Deployment in the cluster.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"k8s.io/client-go/rest"

	"github.com/doppel-dev/doppel/internal/buildinfo"
	"github.com/doppel-dev/doppel/internal/manager"
	"github.com/doppel-dev/doppel/internal/xlog"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "traffic-manager: error:", err)
		os.Exit(1)
	}
}

func run() error {
	log, level := xlog.New(os.Stderr, "traffic-manager")
	cfg := manager.Config{
		Log: log, Level: level, PodName: os.Getenv("POD_NAME"),
		AgentPullPolicy: os.Getenv("DOPPEL_AGENT_PULL_POLICY"), AgentLogLevel: os.Getenv("DOPPEL_AGENT_LOG_LEVEL"),
		Volumes: os.Getenv("DOPPEL_AGENT_VOLUMES"), HiddenVariables: os.Getenv("DOPPEL_HIDDEN_VARIABLES"),
		AgentResources: os.Getenv("DOPPEL_AGENT_RESOURCES"), Namespaces: os.Getenv("DOPPEL_NAMESPACES"), RelayURL: os.Getenv("DOPPEL_RELAY_URL"), DirectAddr: os.Getenv("DOPPEL_DIRECT"), DirectPublic: os.Getenv("DOPPEL_DIRECT_PUBLIC"),
	}
	flag.StringVar(&cfg.Namespace, "namespace", "", "the manager's own namespace")
	flag.StringVar(&cfg.PodIP, "pod-ip", "", "the pod's address, told to agents")
	flag.StringVar(&cfg.AgentImage, "agent-image", "", "image of the traffic-agent that is injected")
	flag.DurationVar(&cfg.RenewInterval, "renew-interval", 0, "how often laptops renew their session (10m)")
	flag.DurationVar(&cfg.LostGrace, "lost-grace", 0, "how long a session outlives its tunnel (30s)")
	flag.BoolVar(&cfg.CheckReach, "check-reach", true, "let sessions get to the namespaces on their object only")
	flag.StringVar(&cfg.Injection, "injection", "", "which workloads may have an agent: onDemand or enabledOnly (onDemand)")
	flag.DurationVar(&cfg.IdleTimeout, "idle-timeout", 0, "after how long without an intercept agents are taken out (0: never)")
	flag.BoolVar(&cfg.NoRedirect, "no-redirect", false, "no agent takes a port by redirect")
	flag.BoolVar(&cfg.NoPolicy, "no-policy", false, "the cluster has no admission policies of doppel; needs a list of namespaces")
	flag.BoolVar(&cfg.NoWebhook, "no-webhook", false, "the cluster has no webhook of doppel")
	version := flag.Bool("version", false, "print the version and exit")
	flag.Parse()
	if *version {
		fmt.Println("traffic-manager", buildinfo.String())
		return nil
	}
	// Streaming lists (KEP-3157) wait about a second for their first bookmark; a plain list lets a restarted manager work at once.
	if err := os.Setenv("KUBE_FEATURE_WatchListClient", "false"); err != nil {
		return err
	}
	kube, err := rest.InClusterConfig()
	if err != nil {
		return err
	}
	cfg.Kube, kube.QPS, kube.Burst = kube, 100, 200
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	m, err := manager.New(ctx, cfg)
	if err != nil {
		return err
	}
	return m.Run(ctx)
}
