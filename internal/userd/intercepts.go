package userd

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/kinds"
	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/match"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/uerr"
	"github.com/doppel-dev/doppel/internal/wire"
)

// defaultInterceptTimeout is how long a new intercept may take to become active.
const defaultInterceptTimeout = 60 * time.Second

// mendTimeout bounds the replacement of a pod that an intercept has left unable to start: its old self may take its time to end.
const mendTimeout = time.Minute

// localDialTimeout bounds the connection to the local process: the agent waits a second in all (D3).
const localDialTimeout = 700 * time.Millisecond

// intercepts is the set of this session's intercepts.
type intercepts struct {
	s *session

	mu sync.Mutex
	// guarded by mu
	byName   map[string]*intercept
	states   map[string]control.Intercept // by UID, as the manager last said
	change   chan struct{}                // closed when states is replaced
	problems []string                     // what the manager says is wrong with itself
	lost     map[string]string            // by name: why an intercept ended that nobody here left
}

// intercept is one intercept of ours. Its fields are constant; object is replaced as a whole under the set's lock. Until it has been
// created the object has no UID.
type intercept struct {
	name   string
	target netip.AddrPort
	object *v1alpha1.Intercept
	active bool // has been; guarded by the set's lock
	toPod  *toPod
}

// declared says that the intercept was made without us, and is not ours to remove unless we are told so.
func (in *intercept) declared() bool { return in.object.UID != "" && in.object.Spec.Session == "" }

func newIntercepts(s *session) *intercepts {
	return &intercepts{s: s, byName: map[string]*intercept{}, lost: map[string]string{}, states: map[string]control.Intercept{}, change: make(chan struct{})}
}

// create makes an intercept and waits until it is active. Whatever ends the wait otherwise removes what was created.
func (x *intercepts) create(ctx context.Context, req localapi.InterceptRequest, progress localapi.Progress) (localapi.Intercept, error) {
	spec, target, err := x.plan(req)
	if err != nil {
		return localapi.Intercept{}, err
	}
	ns := cmp.Or(req.Namespace, x.s.cluster.Namespace)
	if spec.Workload, err = x.workload(ctx, ns, cmp.Or(req.Workload, req.Name)); err != nil {
		return localapi.Intercept{}, err
	}
	in := &intercept{name: req.Name, target: target, object: &v1alpha1.Intercept{ObjectMeta: metav1.ObjectMeta{Namespace: ns}, Spec: spec}}
	if in.toPod, err = listenToPod(spec.ToPod); err != nil {
		return localapi.Intercept{}, err
	}
	progress("Creating intercept %s in namespace %s", req.Name, ns)
	v, err := x.establish(ctx, in, cmp.Or(req.Timeout, defaultInterceptTimeout), progress)
	if err != nil {
		in.toPod.close()
		return v, err
	}
	in.toPod.serve(x, in)
	return v, nil
}

// establish creates the object and waits until it is active.
func (x *intercepts) establish(ctx context.Context, in *intercept, timeout time.Duration, progress localapi.Progress) (localapi.Intercept, error) {
	if err := x.reserve(in); err != nil {
		return localapi.Intercept{}, err
	}
	ns, spec := in.object.Namespace, in.object.Spec
	// An interrupt does not stop the request half-way: the object might be there and nobody know its name.
	o, err := x.s.cluster.CreateIntercept(context.WithoutCancel(ctx), ns, spec)
	x.mu.Lock()
	if err != nil {
		delete(x.byName, in.name)
		x.mu.Unlock()
		return localapi.Intercept{}, err
	}
	in.object = o
	x.mu.Unlock()
	wctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	st, err := x.wait(wctx, in, progress)
	if err != nil {
		x.discard(in)
		x.mend(st)
		return localapi.Intercept{}, err
	}
	x.mu.Lock()
	in.active = true
	x.mu.Unlock()
	return x.view(in, st), nil
}

// has says whether there is an intercept of that name.
func (x *intercepts) has(name string) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.byName[name] != nil
}

// plan checks everything that can be checked without a side effect.
func (x *intercepts) plan(req localapi.InterceptRequest) (v1alpha1.InterceptSpec, netip.AddrPort, error) {
	local, remote, _ := strings.Cut(req.Port, ":")
	n, err := strconv.ParseUint(local, 10, 16)
	if err != nil || n == 0 {
		return v1alpha1.InterceptSpec{}, netip.AddrPort{}, uerr.New(uerr.Usage, "for example: -p 3000, or -p 8080:http", "port %q: want LOCAL[:REMOTE] with a local port number", req.Port)
	}
	if remote == "" && strings.Contains(req.Port, ":") {
		return v1alpha1.InterceptSpec{}, netip.AddrPort{}, uerr.New(uerr.Usage, "for example: -p 8080:http", "port %q: nothing after the colon", req.Port)
	}
	addr, err := netip.ParseAddr(cmp.Or(req.Address, "127.0.0.1"))
	if err != nil {
		return v1alpha1.InterceptSpec{}, netip.AddrPort{}, uerr.New(uerr.Usage, "for example: --address 127.0.0.1", "address %q is not an IP address", req.Address)
	}
	if _, err := match.Compile(req.Match); err != nil {
		return v1alpha1.InterceptSpec{}, netip.AddrPort{}, uerr.Wrap(err, uerr.Usage, "for example: --http-match=x-user=louise", "the match cannot be used")
	}
	target := netip.AddrPortFrom(addr, uint16(n))
	return v1alpha1.InterceptSpec{
		User: x.s.user, Session: x.s.uid(), Name: req.Name,
		Port: remote, Service: req.Service, Container: req.Container, HTTP: v1alpha1.NewHTTPMatch(req.Match), Target: target.String(),
		Recreate: req.Recreate, Takeover: req.Takeover, ToPod: req.ToPod,
	}, target, nil
}

// workload finds the workload that somebody called [KIND/]NAME.
func (x *intercepts) workload(ctx context.Context, ns, word string) (v1alpha1.WorkloadRef, error) {
	kind, name, err := kinds.Parse(word)
	if err != nil {
		return v1alpha1.WorkloadRef{}, uerr.Wrap(err, uerr.Usage, "for example: -w statefulset/db", "the workload")
	}
	if kind == "" {
		if kind, err = x.s.cluster.KindOf(ctx, ns, name); err != nil {
			return v1alpha1.WorkloadRef{}, err
		}
	}
	return v1alpha1.WorkloadRef{Kind: kind, Name: name}, nil
}

// reserve enters an intercept that is about to be created. It refuses a name or a local port that another intercept of ours has.
func (x *intercepts) reserve(in *intercept) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.byName[in.name] != nil {
		return uerr.New(uerr.Conflict, "end it first with: doppel leave "+in.name, "there is an intercept %s already", in.name)
	}
	for _, o := range x.byName {
		if o.target == in.target && udp(o) == udp(in) && in.target.IsValid() {
			return uerr.New(uerr.Conflict, "choose another local port with -p", "%s is taken by intercept %s already", in.target, o.name)
		}
	}
	x.byName[in.name] = in
	delete(x.lost, in.name)
	return nil
}

// udp says that a UDP port was asked for: its local port is another one than TCP's of the same number.
func udp(in *intercept) bool { return strings.HasSuffix(strings.ToLower(in.object.Spec.Port), "/udp") }

// wait follows the intercept's state until it is active or has failed.
func (x *intercepts) wait(ctx context.Context, in *intercept, progress localapi.Progress) (control.Intercept, error) {
	said, seen, replaced := "", "", ""
	var last control.Intercept
	for {
		x.mu.Lock()
		uid := string(in.object.UID) // another one after a new session had to take the old one's place
		st, ok := x.states[uid]
		change := x.change
		x.mu.Unlock()
		if ok {
			last, seen = st, uid
		} else if seen == uid {
			return last, uerr.New(uerr.Conflict, "try again, or ask who did it", "the intercept was removed in the cluster by somebody else")
		}
		if last.ReplaceUID != replaced && last.ReplaceUID != "" && last.State == string(v1alpha1.InterceptPending) {
			replaced = last.ReplaceUID
			if err := x.s.cluster.ReplacePod(ctx, last.Namespace, last.Replace, types.UID(last.ReplaceUID)); err != nil {
				return last, err
			}
		}
		switch v1alpha1.InterceptState(last.State) {
		case v1alpha1.InterceptActive:
			return last, nil
		case v1alpha1.InterceptFailed:
			return last, uerr.New(kindOf(last.Reason), hintFor(last), "%s", last.Message)
		case v1alpha1.InterceptPending:
		}
		if last.Message != "" && last.Message != said {
			said = last.Message
			progress("%s", strings.ToUpper(said[:1])+said[1:])
		}
		select {
		case <-ctx.Done():
			if errors.Is(context.Cause(ctx), context.Canceled) {
				return last, uerr.New(uerr.Canceled, "", "interrupted; the intercept was removed")
			}
			return last, uerr.New(uerr.Cluster, fmt.Sprintf("look at it with: kubectl -n %s get pods; give it longer with --timeout", last.Namespace), "the intercept did not become active in time: %s", cmp.Or(last.Message, "the traffic-manager has not answered"))
		case <-x.s.group.Context().Done():
			return last, uerr.New(uerr.NotConnected, "connect again with: doppel connect", "the session ended")
		case <-change:
		}
	}
}

func kindOf(reason string) uerr.Kind {
	switch reason {
	case "NoWorkload", "NoPort", "NoSuchPort", "NoSuchService", "NoSuchContainer":
		return uerr.NotFound
	case "AmbiguousPort", "BadMatch":
		return uerr.Usage
	case "PortHeld":
		return uerr.Conflict
	}
	return uerr.Cluster
}

func hintFor(in control.Intercept) string {
	switch in.Reason {
	case "NoWorkload":
		return "see what there is with: doppel list -n " + in.Namespace
	case "NoPort":
		return "declare a containerPort in its pod template, or make a Service that selects its pods"
	case "NoSuchPort", "AmbiguousPort":
		return "name the port with -p LOCAL:REMOTE"
	case "Gap":
		return "replace them all the same with: --recreate"
	case "PodSecurity":
		return "give the container port a name and let every Service say that name in targetPort: it is then taken without a privilege"
	case "Owned":
		return "intercept that: see doppel list -n " + in.Namespace
	case "PortHeld":
		return "take other requests (--http-match), talk to them, or end theirs with --takeover if you may; see: doppel list -n " + in.Namespace
	case "NotInjected":
		return "can the API server reach the traffic-manager's pod on port 10250? (firewalls of private clusters)"
	case "AgentNotStarted":
		return fmt.Sprintf("look at the pods with: kubectl -n %s get pods; the workload is being restarted without the agent", in.Namespace)
	}
	return ""
}

// discard removes an intercept, also when the caller is gone.
func (x *intercepts) discard(in *intercept) {
	x.mu.Lock()
	if x.byName[in.name] == in {
		delete(x.byName, in.name)
	}
	o := in.object
	x.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := x.s.cluster.DeleteIntercept(ctx, o); err != nil {
		x.s.log.Warn("intercept not deleted; it ends with the session", "intercept", in.name, "err", err)
	}
}

// mend replaces the pod that an intercept which has failed, and is gone, has left unable to start.
func (x *intercepts) mend(st control.Intercept) {
	if st.State != string(v1alpha1.InterceptFailed) || st.Replace == "" {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), mendTimeout)
	defer cancel()
	if err := x.s.cluster.ReplacePod(ctx, st.Namespace, st.Replace, types.UID(st.ReplaceUID)); err != nil {
		x.s.log.Error("pod not replaced: its traffic-agent does not start", "pod", st.Replace, "err", err)
	}
}

func (x *intercepts) leave(ctx context.Context, name string) error {
	x.mu.Lock()
	in := x.byName[name]
	if in != nil && in.object.UID == "" {
		x.mu.Unlock()
		return uerr.New(uerr.Conflict, "interrupt that command, or wait for it", "intercept %s is just being created", name)
	}
	why, lost := x.lost[name]
	delete(x.lost, name)
	delete(x.byName, name) // from now on the app in the cluster answers
	x.mu.Unlock()
	if lost {
		return uerr.New(uerr.Conflict, "nothing is left to do", "intercept %s had ended already: %s", name, why)
	}
	if in == nil {
		return uerr.New(uerr.NotFound, "see your intercepts with: doppel list -i", "no intercept %q of yours", name)
	}
	if err := x.s.cluster.DeleteIntercept(ctx, in.object); err != nil {
		x.mu.Lock()
		x.byName[name] = in
		x.mu.Unlock()
		return err
	}
	in.toPod.close()
	return x.waitGone(ctx, string(in.object.UID))
}

// waitGone returns when the manager no longer lists the intercept, so that after "leave" the app answers.
func (x *intercepts) waitGone(ctx context.Context, uid string) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	for {
		x.mu.Lock()
		_, there := x.states[uid]
		change := x.change
		x.mu.Unlock()
		if !there {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil // the object is deleted; the manager will see it
		case <-change:
		}
	}
}

func (x *intercepts) removeAll(ctx context.Context) {
	x.mu.Lock()
	var objects []*v1alpha1.Intercept
	all := slices.Collect(maps.Values(x.byName))
	for _, in := range all {
		if in.object.UID != "" && !in.declared() { // else whoever creates it removes it: the session has ended
			objects = append(objects, in.object)
		}
	}
	x.byName = map[string]*intercept{}
	x.mu.Unlock()
	for _, in := range all {
		in.toPod.close()
	}
	for _, o := range objects {
		if err := x.s.cluster.DeleteIntercept(ctx, o); err != nil {
			x.s.log.Warn("intercept not deleted; it ends with the session", "intercept", o.Spec.Name, "err", err)
		}
	}
}

// resume creates the intercepts again when a new session had to take the old one's place.
func (x *intercepts) resume(ctx context.Context, session string) {
	x.mu.Lock()
	var stale []*intercept
	for _, in := range x.byName {
		if in.object.UID != "" && !in.declared() && in.object.Spec.Session != session {
			stale = append(stale, in)
		}
	}
	x.mu.Unlock()
	for _, in := range stale {
		spec := in.object.Spec
		spec.Session, spec.Takeover = session, false // that was meant for then
		o, err := x.s.cluster.CreateIntercept(ctx, in.object.Namespace, spec)
		if err != nil {
			x.s.log.Error("intercept not resumed", "intercept", in.name, "err", err)
			continue
		}
		x.mu.Lock()
		in.object = o
		x.mu.Unlock()
	}
}

// update takes the manager's word on all our intercepts. One that somebody has ended is forgotten here too, but for the reason.
func (x *intercepts) update(m control.Intercepts) {
	states := make(map[string]control.Intercept, len(m.Items))
	for _, i := range m.Items {
		states[i.UID] = i
	}
	x.mu.Lock()
	for name, in := range x.byName {
		uid := string(in.object.UID)
		_, had := x.states[uid]
		st, has := states[uid]
		why := ""
		switch {
		case had && !has && (in.declared() || in.object.Spec.Session == string(x.s.uid())):
			why = "it was removed in the cluster at " + time.Now().Format(time.TimeOnly)
		case in.active && st.State == string(v1alpha1.InterceptFailed):
			why = st.Message
			if !in.declared() {
				go x.discard(&intercept{name: name, object: in.object})
			}
		default:
			continue
		}
		x.s.log.Warn("intercept ended", "intercept", name, "why", why)
		x.lost[name] = why
		delete(x.byName, name)
		go in.toPod.close()
	}
	for uid, st := range states {
		if st.Declared && st.State != string(v1alpha1.InterceptFailed) && !x.knows(uid) {
			go x.adopt(st)
		}
	}
	x.states, x.problems = states, m.Problems
	close(x.change)
	x.change = make(chan struct{})
	x.mu.Unlock()
}

// knows says whether an intercept is ours; the lock is held.
func (x *intercepts) knows(uid string) bool {
	for _, in := range x.byName {
		if string(in.object.UID) == uid {
			return true
		}
	}
	return false
}

// adopt makes an intercept ours that its user has declared in the cluster. What its object says is believed only as far as the user has
// agreed to at connect: it is theirs, and it leads to this machine's loopback.
func (x *intercepts) adopt(st control.Intercept) {
	o, err := x.s.cluster.Intercept(context.Background(), st.Namespace, st.Name)
	if err != nil {
		x.s.log.Warn("declared intercept not taken", "intercept", st.Name, "err", err)
		return
	}
	target, err := netip.ParseAddrPort(o.Spec.Target)
	if err != nil || !target.Addr().IsLoopback() || o.Spec.User != x.s.user || !x.s.cfg.accept || string(o.UID) != st.UID {
		x.s.log.Warn("declared intercept not taken", "intercept", st.Name, "err", "it is not for this machine's loopback, or not ours")
		return
	}
	in := &intercept{name: cmp.Or(o.Spec.Name, o.Name), target: target, object: o, active: true}
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.knows(st.UID) {
		return
	}
	if x.byName[in.name] != nil {
		in.name = o.Name
	}
	if x.byName[in.name] != nil {
		in.name = string(o.UID)
	}
	delete(x.lost, in.name)
	x.byName[in.name] = in
}

// take gives an intercepted flow to the local process; if that does not listen the app in the cluster answers.
func (x *intercepts) take(r *mux.Request, h wire.InterceptHeader) {
	target, ok := x.target(h.Intercept)
	if !ok {
		_ = r.Reject(wire.CodeNotFound, "no such intercept")
		return
	}
	d := net.Dialer{Timeout: localDialTimeout}
	network := "tcp"
	if h.Proto == wire.ProtoUDP {
		network = "udp"
	}
	c, err := d.DialContext(r.Context(), network, target.String())
	if err != nil {
		_ = r.Reject(wire.CodeOf(err), err.Error())
		return
	}
	_ = tunnel.ServeConn(r, c) // how a flow ended is between its two ends
}

func (x *intercepts) target(uid string) (netip.AddrPort, bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, in := range x.byName {
		if uid != "" && string(in.object.UID) == uid && in.target.IsValid() {
			return in.target, true
		}
	}
	return netip.AddrPort{}, false
}

// all lists our intercepts and the manager's own problems.
func (x *intercepts) all() ([]localapi.Intercept, []string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	out := []localapi.Intercept{}
	for _, in := range x.byName {
		if in.object.Spec.Mode == v1alpha1.ModeEgress {
			continue // it takes nothing from anybody; doppel routes tells of it
		}
		out = append(out, x.view(in, x.states[string(in.object.UID)]))
	}
	slices.SortFunc(out, func(a, b localapi.Intercept) int { return cmp.Compare(a.Name, b.Name) })
	problems := slices.Clone(x.problems)
	for _, name := range slices.Sorted(maps.Keys(x.lost)) {
		problems = append(problems, fmt.Sprintf("intercept %s has ended: %s", name, x.lost[name]))
	}
	return out, problems
}

func (x *intercepts) view(in *intercept, st control.Intercept) localapi.Intercept {
	v := describe(in.object, in.object.Spec.Session)
	v.State, v.Message, v.Port = cmp.Or(strings.ToUpper(st.State), "PENDING"), st.Message, st.Port
	v.Protocol, v.Mine = st.Protocol, true
	return v
}

// describe is an Intercept object for people; session tells ours from a colleague's.
func describe(o *v1alpha1.Intercept, session string) localapi.Intercept {
	v := localapi.Intercept{
		Name: o.Spec.Name, Namespace: o.Namespace, Kind: o.Spec.Workload.Kind, Workload: o.Spec.Workload.Name,
		State: cmp.Or(strings.ToUpper(string(o.Status.State)), "PENDING"), Message: o.Status.Message,
		Match: o.Spec.HTTP.Rule(), Target: o.Spec.Target, ToPod: o.Spec.ToPod, User: o.Spec.User, Mine: o.Holder() == session,
	}
	if len(o.Status.Ports) > 0 {
		v.Port, v.Protocol = uint16(o.Status.Ports[0].ContainerPort), o.Status.Ports[0].Protocol
	}
	return v
}
