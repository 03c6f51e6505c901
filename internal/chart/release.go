package chart

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"helm.sh/helm/v4/pkg/action"
	chartv2 "helm.sh/helm/v4/pkg/chart/v2"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	helmkube "helm.sh/helm/v4/pkg/kube"
	ri "helm.sh/helm/v4/pkg/release"
	"helm.sh/helm/v4/pkg/release/common"
	release "helm.sh/helm/v4/pkg/release/v1"
	"helm.sh/helm/v4/pkg/storage/driver"
	"k8s.io/client-go/rest"

	"github.com/doppel-dev/doppel/internal/kube"
	"github.com/doppel-dev/doppel/internal/uerr"
)

const (
	opInstall   = "install the traffic-manager"
	opUpgrade   = "upgrade the traffic-manager"
	opUninstall = "uninstall the traffic-manager"
	opStatus    = "look for the traffic-manager's release"

	// pendingFor is how long an operation of somebody else is believed to be under way; after that it was interrupted.
	pendingFor = 2 * time.Minute
	// cleanupTimeout bounds putting things back after a failure, which has its own time.
	cleanupTimeout = 45 * time.Second
	// maxHistory is how many revisions a release keeps.
	maxHistory = 5
)

// Release is what is installed.
type Release struct {
	Namespace  string    `json:"namespace"`
	Version    string    `json:"version"`    // of the chart
	AppVersion string    `json:"appVersion"` // of the programs
	Revision   int       `json:"revision"`
	Status     string    `json:"status"` // Helm's word: deployed, failed, pending-install, …
	Updated    time.Time `json:"updated"`
}

// Status returns the release in namespace (empty means DefaultNamespace), or an error that wraps ErrNotInstalled.
func Status(ctx context.Context, cfg *rest.Config, namespace string) (*Release, error) {
	o := Options{Namespace: namespace}.withDefaults()
	c, err := newClient(ctx, cfg, o.Namespace, nil)
	if err != nil {
		return nil, err
	}
	r, err := c.lastRelease()
	if err != nil {
		return nil, c.explain(ctx, err, opStatus)
	}
	if r == nil {
		return nil, c.absent(ctx, opStatus)
	}
	return describe(r), nil
}

func describe(r *release.Release) *Release {
	d := &Release{Namespace: r.Namespace, Revision: r.Version}
	if r.Chart != nil && r.Chart.Metadata != nil {
		d.Version, d.AppVersion = r.Chart.Metadata.Version, r.Chart.Metadata.AppVersion
	}
	if r.Info != nil {
		d.Status, d.Updated = r.Info.Status.String(), r.Info.LastDeployed
	}
	return d
}

func notInstalled(namespace string) error {
	return uerr.Wrap(ErrNotInstalled, uerr.NotFound, "doppel helm install"+kube.ManagerFlag(namespace), "namespace %s", namespace)
}

// lastRelease returns the newest revision, or nil if there is none.
func (c *client) lastRelease() (*release.Release, error) {
	rel, err := c.helm.Releases.Last(ReleaseName)
	if errors.Is(err, driver.ErrReleaseNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	r, ok := rel.(*release.Release)
	if !ok {
		return nil, fmt.Errorf("helm release of a kind not known: %T", rel)
	}
	return r, nil
}

// Install installs the embedded chart as a Helm release. It refuses, without a change to the cluster, if the caller may not; if the
// manager is there already (ErrInstalled); or if the values are wrong. An install that fails or is cancelled is taken back whole.
func Install(ctx context.Context, cfg *rest.Config, o Options) (err error) {
	o = o.withDefaults()
	ctx, cancel := context.WithTimeout(ctx, o.Timeout)
	defer cancel()
	c, ch, vals, err := prepare(ctx, cfg, o)
	if err != nil {
		return err
	}
	if _, err := render(ch, vals, o.Namespace); err != nil {
		return err
	}
	if err := c.checkServer(); err != nil {
		return c.explain(ctx, err, opInstall)
	}
	exists := c.namespaceExists(ctx)
	sc := scopeOf(vals)
	if err := c.mayInstall(ctx, opInstall, o.CreateNamespace && !exists, sc); err != nil {
		return err
	}
	if err := c.refuseOverlap(ctx, opInstall, sc); err != nil {
		return err
	}
	if err := c.settle(ctx, o); err != nil {
		return err
	}
	created, err := c.ensureNamespace(ctx, o)
	if err != nil {
		return c.explain(ctx, err, opInstall)
	}
	madeCRDs := false
	var made ri.Releaser
	defer func() {
		// Whoever came first keeps what they installed.
		if err != nil && !errors.Is(err, ErrInstalled) {
			if left := takeBack(cfg, o, made, created, madeCRDs); left != nil {
				err = leftBehind(err, left, "what is left is removed by: doppel helm uninstall"+kube.ManagerFlag(o.Namespace))
			}
		}
	}()
	if madeCRDs, err = c.applyCRDs(ctx, ch, o.Progress); err != nil {
		return c.explain(ctx, err, opInstall)
	}

	o.Progress(fmt.Sprintf("installing traffic-manager %s in namespace %s", ch.Metadata.AppVersion, o.Namespace))
	in := action.NewInstall(c.helm)
	in.ReleaseName, in.Namespace, in.Timeout = ReleaseName, o.Namespace, o.Timeout
	in.WaitStrategy = helmkube.HookOnlyStrategy // we wait ourselves, and say why it takes long
	in.ForceConflicts = true
	in.SkipCRDs = true
	if made, err = in.RunWithContext(ctx, ch, vals); err != nil {
		if errors.Is(err, driver.ErrReleaseExists) || strings.Contains(err.Error(), "cannot reuse a name that is still in use") {
			return uerr.Wrap(ErrInstalled, uerr.Conflict, "somebody else installs it at this moment; try again", "namespace %s", o.Namespace)
		}
		return c.explain(ctx, err, opInstall)
	}
	if !o.Wait {
		return nil
	}
	return c.waitReady(ctx, o)
}

// prepare reads what can be wrong before anything is touched: values, chart, credentials.
func prepare(ctx context.Context, cfg *rest.Config, o Options) (*client, *chartv2.Chart, map[string]any, error) {
	vals, err := o.values()
	if err != nil {
		return nil, nil, nil, err
	}
	ch, err := Load()
	if err != nil {
		return nil, nil, nil, err
	}
	c, err := newClient(ctx, cfg, o.Namespace, o.Log)
	if err != nil {
		return nil, nil, nil, err
	}
	for _, s := range o.Set {
		c.flags = append(c.flags, "--set "+uerr.ShellQuote(s))
	}
	for _, s := range o.SetString {
		c.flags = append(c.flags, "--set-string "+uerr.ShellQuote(s))
	}
	return c, ch, vals, nil
}

// settle deals with a release that is there before an install: a deployed one is ErrInstalled, one in the making is waited for,
// and the remains of an interrupted or failed one are removed.
func (c *client) settle(ctx context.Context, o Options) error {
	for told := false; ; {
		r, err := c.lastRelease()
		if err != nil {
			return c.explain(ctx, err, opInstall)
		}
		if r == nil {
			return c.refuseForeign(ctx, opInstall)
		}
		st := r.Info.Status
		switch {
		case st == common.StatusDeployed || st == common.StatusSuperseded:
			return uerr.Wrap(ErrInstalled, uerr.Conflict, "doppel helm upgrade"+kube.ManagerFlag(c.namespace), "namespace %s", c.namespace)
		case (st.IsPending() || st == common.StatusUninstalling) && time.Since(r.Info.LastDeployed) < pendingFor:
			if !told {
				o.Progress("waiting for somebody else's " + string(st))
				told = true
			}
			if err := sleep(ctx, time.Second); err != nil {
				return uerr.New(uerr.Conflict, "try again; an operation that was interrupted is cleaned up after 2 minutes",
					"%s: another operation (%s) is under way since %s", opInstall, st, r.Info.LastDeployed.Format(time.TimeOnly))
			}
			continue
		case r.Version > 1 && st != common.StatusUninstalled && st != common.StatusUninstalling:
			// A failed or interrupted upgrade of a release that worked: nothing to throw away.
			return uerr.Wrap(ErrInstalled, uerr.Conflict, "doppel helm upgrade"+kube.ManagerFlag(c.namespace), "namespace %s (its last upgrade: %s)", c.namespace, st)
		}
		o.Progress("removing what an earlier install left (" + string(st) + ")")
		if err := c.remove(ctx); err != nil {
			return c.explain(ctx, err, opInstall)
		}
		return nil
	}
}

// takeBack removes whatever a failed install made, unless somebody else has installed it meanwhile. It works even if the caller's context is gone.
func takeBack(cfg *rest.Config, o Options, made ri.Releaser, createdNamespace, madeCRDs bool) error {
	ctx, cancel := context.WithTimeout(context.Background(), cleanupTimeout)
	defer cancel()
	o.Progress("taking the install back")
	c, err := newClient(ctx, cfg, o.Namespace, o.Log)
	if err != nil {
		return err
	}
	r, err := c.lastRelease()
	if err != nil {
		return fmt.Errorf("take the install back: %w", err)
	}
	if ours, _ := made.(*release.Release); theirs(r, ours) {
		o.Progress("what somebody else installs there at this moment stays")
		return nil
	}
	if made != nil {
		if err := c.remove(ctx); err != nil {
			return fmt.Errorf("take the install back: %w", err)
		}
		if r, err = c.lastRelease(); err != nil {
			return fmt.Errorf("take the install back: %w", err)
		}
	}
	if r != nil { // made since
		o.Progress("what somebody else installs there at this moment stays")
		return nil
	}
	if madeCRDs {
		if err := c.removeCRDs(ctx, nil, o.Progress); err != nil {
			return fmt.Errorf("take the install back: %w", err)
		}
	}
	if createdNamespace {
		found, _, err := c.namespaceUsed(ctx)
		if err == nil && found != "" {
			o.Progress(fmt.Sprintf("namespace %s stays: %s", c.namespace, found))
			return nil
		}
		if err := c.deleteNamespace(ctx); err != nil {
			return fmt.Errorf("take the install back: %w", err)
		}
	}
	return nil
}

// Upgrade brings the release to this program's version. The overrides of earlier installs stay, unless o.ResetValues. An upgrade that
// fails or is cancelled is rolled back to what was there.
func Upgrade(ctx context.Context, cfg *rest.Config, o Options) error {
	o = o.withDefaults()
	ctx, cancel := context.WithTimeout(ctx, o.Timeout)
	defer cancel()
	c, ch, vals, err := prepare(ctx, cfg, o)
	if err != nil {
		return err
	}
	r, err := c.lastRelease()
	if err != nil {
		return c.explain(ctx, err, opUpgrade)
	}
	if r == nil {
		return c.absent(ctx, opUpgrade)
	}
	full := o.over(r.Config, vals)
	if _, err := render(ch, full, o.Namespace); err != nil {
		return err
	}
	sc := scopeOf(full)
	if err := c.mayInstall(ctx, opUpgrade, false, sc); err != nil {
		return err
	}
	if err := c.refuseOverlap(ctx, opUpgrade, sc); err != nil {
		return err
	}
	if err := c.unlock(r); err != nil {
		return c.explain(ctx, err, opUpgrade)
	}
	if _, err := c.applyCRDs(ctx, ch, o.Progress); err != nil {
		return c.explain(ctx, err, opUpgrade)
	}
	o.Progress(fmt.Sprintf("upgrading traffic-manager in namespace %s to %s", o.Namespace, ch.Metadata.AppVersion))
	up := action.NewUpgrade(c.helm)
	up.Namespace, up.Timeout, up.MaxHistory = o.Namespace, o.Timeout, maxHistory
	up.WaitStrategy = helmkube.HookOnlyStrategy
	up.ForceConflicts = true // the chart's word counts for what the chart says, over kubectl edit and scale
	up.ResetValues, up.ResetThenReuseValues = o.ResetValues, !o.ResetValues
	made, err := up.RunWithContext(ctx, ReleaseName, ch, vals)
	if err != nil {
		err = c.explain(ctx, err, opUpgrade)
	} else if o.Wait {
		err = c.waitReady(ctx, o)
	}
	if err == nil {
		return nil
	}
	ours, _ := made.(*release.Release)
	if ours == nil { // nothing was changed: somebody else is at it, for example
		return err
	}
	if left := rollBack(cfg, o, ours); left != nil {
		return leftBehind(err, left, "try again: doppel helm upgrade"+kube.ManagerFlag(o.Namespace))
	}
	return err
}

// leftBehind is the error of an operation that could not be undone, which is not said to be an interrupt only.
func leftBehind(err, left error, hint string) error {
	return uerr.New(uerr.LeftBehind, hint, "%s; %s", oneLine(err.Error()), oneLine(left.Error()))
}

// over are the overrides after an upgrade: vals, and of those that were kept the rest.
func (o Options) over(kept, vals map[string]any) map[string]any {
	if o.ResetValues {
		return vals
	}
	return loader.MergeMaps(kept, vals)
}

// unlock marks a revision that was interrupted long ago as failed, because Helm takes it for one under way, for ever.
func (c *client) unlock(r *release.Release) error {
	if !r.Info.Status.IsPending() || time.Since(r.Info.LastDeployed) < pendingFor {
		return nil
	}
	r.Info.Status = common.StatusFailed
	r.Info.Description = "interrupted"
	return c.helm.Releases.Update(r)
}

// rollBack returns to the last revision that was well, if ours is the last one. What somebody else has made meanwhile is theirs.
func rollBack(cfg *rest.Config, o Options, ours *release.Release) error {
	ctx, cancel := context.WithTimeout(context.Background(), cleanupTimeout)
	defer cancel()
	c, err := newClient(ctx, cfg, o.Namespace, o.Log)
	if err != nil {
		return err
	}
	r, err := c.lastRelease()
	if err != nil {
		return fmt.Errorf("roll back: %w", err)
	}
	if !same(r, ours) {
		return nil
	}
	all, err := c.helm.Releases.History(ReleaseName)
	if err != nil {
		return fmt.Errorf("roll back: %w", err)
	}
	was := lastGood(all, ours.Version)
	if was == 0 {
		return errors.New("no revision before it was well: nothing to roll back to")
	}
	o.Progress(fmt.Sprintf("rolling back to revision %d", was))
	rb := action.NewRollback(c.helm)
	rb.Version, rb.MaxHistory = was, maxHistory
	rb.WaitStrategy = helmkube.HookOnlyStrategy
	rb.ForceConflicts = true
	if r.Info.Status.IsPending() { // cut off by the caller
		r.Info.Status = common.StatusFailed
		if err := c.helm.Releases.Update(r); err != nil {
			return fmt.Errorf("roll back: %w", err)
		}
	}
	if err := rb.Run(ReleaseName); err != nil {
		return fmt.Errorf("roll back to revision %d: %w", was, err)
	}
	return nil
}

// lastGood is the last revision before one that was deployed, or 0: one that failed is none to go back to. (To Helm, which waits for nothing here, ours was deployed.)
func lastGood(all []ri.Releaser, before int) (version int) {
	for _, rel := range all {
		if r, ok := rel.(*release.Release); ok && r.Version < before && (r.Info.Status == common.StatusDeployed || r.Info.Status == common.StatusSuperseded) {
			version = max(version, r.Version)
		}
	}
	return version
}

// same reports whether a release that was read (nil: there is none) is one that was written.
func same(r, written *release.Release) bool {
	return r != nil && r.Version == written.Version && r.Info.LastDeployed.Equal(written.Info.LastDeployed)
}

// theirs reports whether a release that was read is not the one that was written (nil: none was).
func theirs(r, written *release.Release) bool {
	return r != nil && (written == nil || !same(r, written))
}

// Uninstall removes the release, waits until its pods are gone, and removes the resource types if no other manager needs them, and the namespace if Install
// created it and nothing else has moved in. What is already gone is no error; if there was nothing at all it wraps ErrNotInstalled.
func Uninstall(ctx context.Context, cfg *rest.Config, o Options) error {
	o = o.withDefaults()
	ctx, cancel := context.WithTimeout(ctx, o.Timeout)
	defer cancel()
	c, err := newClient(ctx, cfg, o.Namespace, o.Log)
	if err != nil {
		return err
	}
	r, err := c.lastRelease()
	if err != nil {
		return c.explain(ctx, err, opUninstall)
	}
	left, err := c.leftovers(ctx)
	if err != nil {
		return c.explain(ctx, err, opUninstall)
	}
	if r == nil && len(left) == 0 {
		return c.absent(ctx, opUninstall)
	}
	o.Progress("removing the traffic-manager from namespace " + o.Namespace)
	managers, err := c.managers(ctx)
	if err != nil {
		return c.explain(ctx, err, opUninstall)
	}
	namespaces := managers[c.namespace]
	if r != nil {
		namespaces = append(namespaces, scopeOf(r.Config).namespaces...) // whoever may not list bindings knows them from here
	}
	if err := c.remove(ctx); err != nil {
		return c.explain(ctx, err, opUninstall)
	}
	if err := c.removeCRDs(ctx, namespaces, o.Progress); err != nil {
		return c.explain(ctx, err, opUninstall)
	}
	if err := c.deleteNamespaceIfOurs(ctx, o.Progress); err != nil {
		return c.explain(ctx, err, opUninstall)
	}
	return nil
}
