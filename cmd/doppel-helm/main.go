// Command doppel-helm installs, upgrades and uninstalls the traffic-manager for doppel, which runs it.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/doppel-dev/doppel/internal/chart"
	"github.com/doppel-dev/doppel/internal/helm"
	"github.com/doppel-dev/doppel/internal/kube"
	"github.com/doppel-dev/doppel/internal/spawn"
)

func main() {
	ctx, stop := spawn.Interruptible(context.Background())
	code := helm.Serve(ctx, os.Args[1:], os.Stdout, do)
	stop()
	os.Exit(code)
}

func do(ctx context.Context, r helm.Request, progress func(string)) error {
	cluster, err := kube.Load(r.Cluster)
	if err != nil {
		return err
	}
	cfg := cluster.RESTConfig()
	o := chart.Options{
		Namespace: r.Namespace, ValueFiles: r.ValueFiles, Set: r.Set, SetString: r.SetString, CreateNamespace: r.CreateNamespace,
		Wait: r.Wait, Timeout: r.Timeout, ResetValues: r.ResetValues, Progress: progress,
	}
	switch r.Verb {
	case helm.Install:
		return chart.Install(ctx, cfg, o)
	case helm.Upgrade:
		return chart.Upgrade(ctx, cfg, o)
	case helm.Uninstall:
		return chart.Uninstall(ctx, cfg, o)
	case helm.Ensure:
		err = chart.Install(ctx, cfg, o)
		if errors.Is(err, chart.ErrInstalled) {
			return chart.WaitReady(ctx, cfg, o)
		}
		return err
	case helm.Removable:
		_, err = chart.Status(ctx, cfg, o.Namespace)
		if errors.Is(err, chart.ErrNotInstalled) {
			return nil
		}
		return err
	case helm.Remove:
		err = chart.Uninstall(ctx, cfg, o)
		if errors.Is(err, chart.ErrNotInstalled) {
			return nil
		}
		return err
	}
	return fmt.Errorf("unknown verb %q", r.Verb)
}
