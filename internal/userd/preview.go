package userd

import (
	"cmp"
	"context"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/uerr"
)

func previewSpec(p localapi.Preview) *v1alpha1.Preview {
	return &v1alpha1.Preview{ID: p.ID, Ingress: v1alpha1.Ingress(p.Ingress)}
}

// relay says which relay shows previews of a connection's cluster, and guesses where requests enter it.
func (d *Daemon) relay(ctx context.Context, req localapi.RelayRequest, _ localapi.Progress) (localapi.RelayResult, error) {
	s, err := d.use(req.Use)
	if err != nil {
		return localapi.RelayResult{}, err
	}
	out := localapi.RelayResult{Namespace: s.cluster.Namespace}
	if err := s.intercepts.told(ctx); err != nil {
		return out, err
	}
	s.intercepts.mu.Lock()
	if r := s.intercepts.relay; r != nil {
		out.URL, out.Cluster, out.Problem = r.URL, r.Cluster, r.Problem
	}
	s.intercepts.mu.Unlock()
	if !req.Guess {
		return out, nil
	}
	guesses, err := s.cluster.Ingresses(ctx, cmp.Or(req.Namespace, s.cluster.Namespace))
	for _, g := range guesses {
		out.Ingresses = append(out.Ingresses, localapi.Ingress(g))
	}
	return out, err
}

// preview gives an intercept a preview.
func (d *Daemon) preview(ctx context.Context, req localapi.PreviewRequest, progress localapi.Progress) (localapi.Intercept, error) {
	s, err := d.with(req.Name, req.Use)
	if err != nil {
		return localapi.Intercept{}, err
	}
	return s.intercepts.addPreview(ctx, req, progress)
}

// addPreview makes an intercept anew, as what it takes cannot be changed: for a moment the app answers. If it does not come about, it is made
// again as it was.
func (x *intercepts) addPreview(ctx context.Context, req localapi.PreviewRequest, progress localapi.Progress) (localapi.Intercept, error) {
	x.mu.Lock()
	in := x.byName[req.Name]
	if in == nil || in.leaving || in.object.UID == "" || in.declared() {
		x.mu.Unlock()
		return localapi.Intercept{}, uerr.New(uerr.NotFound, "see your intercepts with: doppel list -i", "no intercept %q of yours that could have a preview", req.Name)
	}
	before := in.object
	delete(x.byName, req.Name) // what it has on this machine stays
	x.mu.Unlock()
	spec := before.Spec
	if spec.HTTP == nil && spec.Preview == nil {
		spec.HTTP = &v1alpha1.HTTPMatch{} // all that it took
	}
	spec.Preview, spec.Takeover = previewSpec(req.Preview), false
	progress("Making intercept %s anew, with its preview", req.Name)
	if err := x.s.cluster.DeleteIntercept(ctx, before); err != nil {
		x.mu.Lock()
		x.byName[req.Name] = in
		x.mu.Unlock()
		return localapi.Intercept{}, err
	}
	x.waitGone(ctx, string(before.UID), leaveTimeout)
	again := func(ctx context.Context, spec v1alpha1.InterceptSpec) (localapi.Intercept, error) {
		o := before.DeepCopy()
		o.UID, o.Spec = "", spec
		x.mu.Lock()
		in.object, in.active = o, false
		x.mu.Unlock()
		return x.establish(ctx, in, defaultInterceptTimeout, progress)
	}
	v, err := again(ctx, spec)
	if err == nil {
		return v, nil
	}
	old := before.Spec
	old.Takeover = false
	if _, rerr := again(context.WithoutCancel(ctx), old); rerr != nil { // also for whoever has lost patience
		in.close()
		return v, uerr.Wrap(err, uerr.Cluster, "make it again with: doppel intercept", "the intercept could not be made with a preview, nor as it was (%v)", rerr)
	}
	return v, err
}
