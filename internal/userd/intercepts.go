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

// defaultInterceptTimeout is how long a new intercept may make no progress on its way to active: like a Deployment's progressDeadlineSeconds,
// and unlike a bound of the whole, it fits one pod as well as a hundred that are replaced one after the other.
const defaultInterceptTimeout = 60 * time.Second

// mendTimeout bounds the replacement of a pod that an intercept has left unable to start: its old self may take its time to end.
const mendTimeout = time.Minute

// leaveTimeout and restoreTimeout bound the wait for the end of an intercept: a restart is part of it where a container was replaced.
const (
	leaveTimeout   = 7 * time.Second // the manager gives an agent that does not answer 5 s
	restoreTimeout = 2 * time.Minute
)

// localDialTimeout bounds the connection to the local process: the agent waits a second in all (D3).
const localDialTimeout = 700 * time.Millisecond

// intercepts is the set of this session's intercepts.
type intercepts struct {
	s *session

	mu sync.Mutex
	// guarded by mu
	byName   map[string]*intercept
	states   map[string]control.Intercept // by UID, as the manager last said; nil: it has not yet
	change   chan struct{}                // closed when states is replaced
	problems []string                     // what the manager says is wrong with itself
	relay    *control.Relay               // that the manager is to join; nil: none
	lost     map[string]string            // by name: why an intercept ended that nobody here left
	resuming bool                         // see resume
}

// intercept is one intercept of ours. Its fields are constant; object is replaced as a whole under the set's lock. Until it has been
// created the object has no UID.
type intercept struct {
	name      string
	targets   []target // in the order of the object's spec.ports
	object    *v1alpha1.Intercept
	tls       bool       // the local process speaks TLS
	address   netip.Addr // of ports without a target; invalid: the loopback
	first     types.UID  // of its first object: it may be made anew; "": declared. Guarded by the set's lock
	active    bool       // has been; guarded by the set's lock
	unwatched bool       // nobody waits for its end any more; guarded by the set's lock
	leaving   bool       // its traffic still comes, until the app is back; guarded by the set's lock
	resumeErr error      // why it could not be created again; guarded by the set's lock
	toPod     *toPod
	files     *files // guarded by the set's lock; nil: none
}

// close ends what an intercept has on this machine; again is harmless.
func (in *intercept) close() {
	in.toPod.close()
	in.files.close()
}

// target is where on this machine the traffic of one port ends.
type target struct {
	addr netip.AddrPort // invalid: the port's own number on the loopback
	udp  bool           // a UDP port was asked for: its local port is another one than TCP's of the same number
}

// declared says that the intercept was made without us, and is not ours to remove unless we are told so.
func (in *intercept) declared() bool { return in.object.UID != "" && in.object.Spec.Session == "" }

func newIntercepts(s *session) *intercepts {
	return &intercepts{s: s, byName: map[string]*intercept{}, lost: map[string]string{}, change: make(chan struct{})}
}

// create makes an intercept and waits until it is active. Whatever ends the wait otherwise removes what was created.
func (x *intercepts) create(ctx context.Context, req localapi.InterceptRequest, progress localapi.Progress) (localapi.Intercept, error) {
	spec, targets, address, err := x.plan(req)
	if err != nil {
		return localapi.Intercept{}, err
	}
	ns := cmp.Or(req.Namespace, x.s.cluster.Namespace)
	if spec.Workload, err = x.workload(ctx, ns, cmp.Or(req.Workload, req.Name)); err != nil {
		return localapi.Intercept{}, err
	}
	in := &intercept{name: req.Name, targets: targets, address: address, tls: req.LocalTLS, object: &v1alpha1.Intercept{ObjectMeta: metav1.ObjectMeta{Namespace: ns}, Spec: spec}}
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
	v.Mount, err = x.mount(ctx, in, req.Mount, progress)
	if ctx.Err() != nil { // nobody hears of it any more, and without volumes it may be none
		err = uerr.New(uerr.Canceled, "", "interrupted; the intercept was removed")
	}
	if err != nil {
		return v, errors.Join(err, x.leave(context.WithoutCancel(ctx), in.name, progress))
	}
	return v, nil
}

// establish creates the object and waits until it is active.
func (x *intercepts) establish(ctx context.Context, in *intercept, timeout time.Duration, progress localapi.Progress) (localapi.Intercept, error) {
	ns, spec := in.object.Namespace, in.object.Spec
	if err := refuseUnmanaged(ctx, x.s.cluster, x.s.manager, x.s.cfg.managerNS, ns); err != nil {
		return localapi.Intercept{}, err
	}
	if err := x.reserve(in); err != nil {
		return localapi.Intercept{}, err
	}
	// An interrupt does not stop the request half-way: the object might be there and nobody know its name.
	o, err := x.s.cluster.CreateIntercept(context.WithoutCancel(ctx), ns, spec)
	x.mu.Lock()
	if err != nil {
		delete(x.byName, in.name)
		x.mu.Unlock()
		return localapi.Intercept{}, err
	}
	in.object = o
	in.first = cmp.Or(in.first, o.UID)
	x.mu.Unlock()
	st, err := x.wait(ctx, in, timeout, progress)
	if err != nil {
		x.discard(in)
		x.mend(st)
		return localapi.Intercept{}, err
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	in.active = true
	v := x.view(in, st)
	v.UID = string(in.first)
	return v, nil
}

// other says whether the name is another intercept's than the one with this UID.
func (x *intercepts) other(name, uid string) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	in := x.byName[name]
	return in != nil && string(in.first) != uid
}

// has says whether there is an intercept of that name.
func (x *intercepts) has(name string) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.byName[name] != nil
}

// plan checks everything that can be checked without a side effect.
func (x *intercepts) plan(req localapi.InterceptRequest) (_ v1alpha1.InterceptSpec, targets []target, addr netip.Addr, err error) {
	spec := v1alpha1.InterceptSpec{
		User: x.s.user, Session: x.s.uid(), Name: req.Name, Mode: modes[req.Mode],
		Service: req.Service, Container: req.Container, HTTP: v1alpha1.NewHTTPMatch(req.Match),
		Recreate: req.Recreate, Takeover: req.Takeover,
	}
	if req.Preview != nil {
		spec.Preview = previewSpec(*req.Preview)
		if req.All {
			spec.HTTP = &v1alpha1.HTTPMatch{}
		}
	}
	if _, ok := modes[req.Mode]; !ok {
		return spec, nil, addr, uerr.New(uerr.Usage, "is the daemon of another version? try: doppel quit -s", "mode %q", req.Mode)
	}
	addr, err = netip.ParseAddr(cmp.Or(req.Address, loopback.String()))
	if err != nil {
		return spec, nil, addr, uerr.New(uerr.Usage, "for example: --address 127.0.0.1", "address %q is not an IP address", req.Address)
	}
	for _, port := range req.Ports {
		local, remote, err := splitPort(port)
		if err != nil {
			return spec, nil, addr, err
		}
		t := target{netip.AddrPortFrom(addr, local), strings.HasSuffix(strings.ToLower(remote), "/udp")}
		if slices.Contains(targets, t) {
			return spec, nil, addr, uerr.New(uerr.Usage, "choose another local port for one of them", "local port %d is there twice", local)
		}
		targets = append(targets, t)
		spec.Ports = append(spec.Ports, v1alpha1.WantedPort{Port: remote, Target: t.addr.String()})
	}
	for _, port := range req.ToPod {
		p, err := parseToPod(port)
		if err != nil {
			return spec, nil, addr, err
		}
		spec.ToPod = append(spec.ToPod, p)
	}
	if len(targets) == 0 && req.Mode != localapi.ModeReplace && req.Mode != localapi.ModeIngest {
		return spec, nil, addr, uerr.New(uerr.Usage, "for example: -p 3000, or -p 8080:http", "no port")
	}
	if _, err := match.Compile(req.Match); err != nil {
		return spec, nil, addr, uerr.Wrap(err, uerr.Usage, "for example: --http-match=x-user=louise", "the match cannot be used")
	}
	return spec, targets, addr, nil
}

// modes are the modes of the objects by those of requests.
var modes = map[string]v1alpha1.InterceptMode{"": "", localapi.ModeIntercept: "", localapi.ModeWiretap: v1alpha1.ModeWiretap, localapi.ModeReplace: v1alpha1.ModeReplace, localapi.ModeIngest: v1alpha1.ModeIngest}

// splitPort reads LOCAL[:REMOTE].
func splitPort(port string) (local uint16, remote string, err error) {
	l, remote, both := strings.Cut(port, ":")
	n, err := strconv.ParseUint(l, 10, 16)
	if err != nil || n == 0 {
		return 0, "", uerr.New(uerr.Usage, "for example: -p 3000, or -p 8080:http", "port %q: want LOCAL[:REMOTE] with a local port number", port)
	}
	if both && remote == "" {
		return 0, "", uerr.New(uerr.Usage, "for example: -p 8080:http", "port %q: nothing after the colon", port)
	}
	return uint16(n), remote, nil
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
		for _, t := range in.targets {
			if t.addr.IsValid() && slices.Contains(o.targets, t) {
				return uerr.New(uerr.Conflict, "choose another local port with -p", "%s is taken by intercept %s already", t.addr, o.name)
			}
		}
	}
	x.byName[in.name] = in
	delete(x.lost, in.name)
	return nil
}

// wait follows the intercept's state until it is active or has failed, or until the manager has had nothing new to say of it for the timeout.
func (x *intercepts) wait(ctx context.Context, in *intercept, timeout time.Duration, progress localapi.Progress) (control.Intercept, error) {
	seen, replaced := "", ""
	stuck := time.NewTimer(timeout)
	defer stuck.Stop()
	said := map[string]bool{} // a pod that comes and goes is no progress
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
		if m := last.Message; m != "" && !said[m] {
			said[m] = true
			stuck.Reset(timeout)
			progress("%s", strings.ToUpper(m[:1])+m[1:])
		}
		select {
		case <-ctx.Done():
			return last, uerr.New(uerr.Canceled, "", "interrupted; the intercept was removed")
		case <-stuck.C:
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
	case "AmbiguousPort", "SamePort", "BadMatch", "AmbiguousContainer":
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
	case "AmbiguousContainer":
		return "choose one with --container"
	case "CannotReplace":
		return "take its traffic with doppel intercept, beside the app"
	case "Gap":
		return "replace them all the same with: --recreate"
	case "PodSecurity", "NoRedirect":
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

// leave ends an intercept. The traffic of a replaced container still comes until that runs again.
func (x *intercepts) leave(ctx context.Context, name string, progress localapi.Progress) error {
	x.mu.Lock()
	in := x.byName[name]
	if in != nil && in.leaving {
		unwatched := in.unwatched
		x.mu.Unlock()
		if unwatched {
			in.close() // whoever asks again wants this machine's part to end, whatever comes of the app
			return appAway(in)
		}
		return uerr.New(uerr.Conflict, "wait for it", "intercept %s is just being left", name)
	}
	if in != nil && in.object.UID == "" {
		x.mu.Unlock()
		return uerr.New(uerr.Conflict, "interrupt that command, or wait for it", "intercept %s is just being created", name)
	}
	why, lost := x.lost[name]
	delete(x.lost, name)
	replaces := in != nil && in.object.Spec.Mode == v1alpha1.ModeReplace
	if replaces {
		in.leaving = true
	} else {
		delete(x.byName, name) // from now on the app in the cluster answers
	}
	x.mu.Unlock()
	if lost {
		return uerr.New(uerr.Conflict, "nothing is left to do", "intercept %s had ended already: %s", name, why)
	}
	if in == nil {
		return uerr.New(uerr.NotFound, "see your intercepts with: doppel list -i", "no intercept %q of yours", name)
	}
	// Who is interrupted does not wait any longer, and has left all the same.
	if err := x.s.cluster.DeleteIntercept(context.WithoutCancel(ctx), in.object); err != nil {
		x.mu.Lock()
		in.leaving = false
		if x.byName[name] == nil { // else another one has the name by now
			x.byName[name] = in
		}
		x.mu.Unlock()
		x.s.log.Warn("intercept not left", "intercept", name, "err", err) // who asked may have gone
		return err
	}
	if !replaces {
		in.close()
		x.waitGone(ctx, string(in.object.UID), leaveTimeout)
		return nil
	}
	progress("Restarting %s %s to bring its app back; its traffic comes here until then", in.object.Spec.Workload.Kind, in.object.Spec.Workload.Name)
	if !x.waitGone(ctx, string(in.object.UID), restoreTimeout) {
		x.mu.Lock()
		in.unwatched = true
		x.mu.Unlock()
		if ctx.Err() == nil {
			in.close()
		}
		return appAway(in)
	}
	in.close() // not before: who answers until then needs it
	return nil
}

// appAway says that a replaced app has yet to come back.
func appAway(in *intercept) error {
	return uerr.New(uerr.Cluster, fmt.Sprintf("look at it with: kubectl -n %s get pods", in.object.Namespace), "intercept %s has ended, but the app of %s is not back yet", in.name, in.object.Spec.Workload.Name)
}

// ending is what ends the intercept that has a name now, and no other that has it later.
func (x *intercepts) ending(name string) func(context.Context) error {
	now := func() *intercept {
		x.mu.Lock()
		defer x.mu.Unlock()
		return x.byName[name]
	}
	in := now()
	return func(ctx context.Context) error {
		if in == nil || now() != in {
			return uerr.New(uerr.NotFound, "see your intercepts with: doppel list -i", "intercept %s had ended already", name)
		}
		return x.leave(ctx, name, func(string, ...any) {})
	}
}

// waitGone waits until the manager no longer lists the intercept, so that after "leave" the app answers.
func (x *intercepts) waitGone(ctx context.Context, uid string, timeout time.Duration) bool {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	for {
		x.mu.Lock()
		_, there := x.states[uid]
		change := x.change
		x.mu.Unlock()
		if !there {
			return true
		}
		select {
		case <-ctx.Done():
			return false // the object is deleted; the manager will see it
		case <-x.s.group.Context().Done():
			return false
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
		in.close()
	}
	for _, o := range objects {
		if err := x.s.cluster.DeleteIntercept(ctx, o); err != nil {
			x.s.log.Warn("intercept not deleted; it ends with the session", "intercept", o.Spec.Name, "err", err)
		}
	}
}

// told waits until the manager has said something, which it has not when a session has only just begun.
func (x *intercepts) told(ctx context.Context) error {
	for {
		x.mu.Lock()
		told, change := x.states != nil, x.change
		x.mu.Unlock()
		if told {
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-x.s.group.Context().Done():
			return uerr.New(uerr.NotConnected, "connect again with: doppel connect", "the session ended")
		case <-change:
		}
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
		case !has && in.leaving: // as wanted
			delete(x.byName, name)
			go in.close() // nobody may wait for it any more
			continue
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
		x.endedLocked(name, in, why)
	}
	for uid, st := range states {
		if st.Declared && st.State != string(v1alpha1.InterceptFailed) && !x.knows(uid) {
			go x.adopt(st)
		}
	}
	changed := !slices.Equal(hostsOf(x.states), hostsOf(states)) || resolvingOf(x.states) != resolvingOf(states)
	x.states, x.problems, x.relay = states, m.Problems, m.Relay
	x.mu.Unlock()
	if changed { // before anybody is told that an intercept is active
		x.s.namesChanged()
	}
	x.mu.Lock()
	close(x.change)
	x.change = make(chan struct{})
	x.mu.Unlock()
}

// hosts are the names that the pods of active intercepts have in their own hosts files: a local process in their place finds them too.
func (x *intercepts) hosts() []control.Host {
	x.mu.Lock()
	defer x.mu.Unlock()
	return hostsOf(x.states)
}

func hostsOf(states map[string]control.Intercept) []control.Host {
	var out []control.Host
	for _, uid := range slices.Sorted(maps.Keys(states)) {
		out = append(out, states[uid].Hosts...)
	}
	return out
}

// resolving says who resolves the cluster's names for us: intercepts of pods with a DNS of their own, or "".
func (x *intercepts) resolving() string {
	x.mu.Lock()
	defer x.mu.Unlock()
	return resolvingOf(x.states)
}

func resolvingOf(states map[string]control.Intercept) string {
	var uids []string
	for uid, st := range states {
		if st.OwnDNS {
			uids = append(uids, uid)
		}
	}
	slices.Sort(uids)
	return strings.Join(uids, " ")
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
	var targets []target
	local := true
	for _, p := range o.Spec.Ports {
		var t target
		if p.Target != "" {
			t.addr, err = netip.ParseAddrPort(p.Target)
			local = local && err == nil && t.addr.Addr().IsLoopback()
		}
		targets = append(targets, t)
	}
	if !local || o.Spec.User != x.s.user || !x.s.cfg.accept || string(o.UID) != st.UID {
		x.s.log.Warn("declared intercept not taken", "intercept", st.Name, "err", "it is not for this machine's loopback, or not ours")
		return
	}
	in := &intercept{name: cmp.Or(o.Spec.Name, o.Name), targets: targets, object: o, active: true}
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
	network, protocol := "tcp", "TCP"
	if h.Proto == wire.ProtoUDP {
		network, protocol = "udp", "UDP"
	}
	target, speaksTLS, ok := x.target(h.Intercept, control.Port{Protocol: protocol, Number: h.Port})
	if !ok {
		_ = r.Reject(wire.CodeNotFound, "no such intercept")
		return
	}
	d := net.Dialer{Timeout: localDialTimeout}
	c, err := d.DialContext(r.Context(), network, target.String())
	if err != nil {
		_ = r.Reject(wire.CodeOf(err), err.Error())
		return
	}
	if raw, tcp := c.(*net.TCPConn); tcp && speaksTLS {
		c = newLocalTLS(raw)
	}
	_ = tunnel.ServeConn(r, c, nil) // how a flow ended is between its two ends
}

// target is where a container port's traffic ends, and whether TLS is spoken there: the manager says which of the intercept's ports it is, and
// we where that one leads.
func (x *intercepts) target(uid string, port control.Port) (to netip.AddrPort, speaksTLS, ok bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	i := slices.Index(x.states[uid].Ports, port)
	for _, in := range x.byName {
		if i < 0 || string(in.object.UID) != uid {
			continue
		}
		if i < len(in.targets) && in.targets[i].addr.IsValid() {
			return in.targets[i].addr, in.tls, true
		}
		if i >= len(in.targets) && in.object.Spec.Mode != v1alpha1.ModeReplace {
			continue // nobody here has asked for it
		}
		address := in.address
		if !address.IsValid() {
			address = loopback
		}
		return netip.AddrPortFrom(address, port.Number), in.tls, true
	}
	return netip.AddrPort{}, false, false
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
	v.State, v.Message = cmp.Or(strings.ToUpper(st.State), "PENDING"), st.Message
	if in.resumeErr != nil {
		v.Message = "not created again for the new session yet: " + in.resumeErr.Error()
	}
	v.LocalTLS = in.tls
	v.Ports, v.Mine, v.Mount = ports(in.object.Spec.Ports, st.Ports), true, in.files.view()
	for i := len(in.targets); i < len(v.Ports) && in.address.IsValid(); i++ {
		v.Ports[i].Target = netip.AddrPortFrom(in.address, v.Ports[i].Port).String()
	}
	if v.Container = ""; aboutContainer(in.object.Spec.Mode) {
		v.Container = st.Container
	}
	return v
}

// aboutContainer says that a whole container is meant, whatever its ports.
func aboutContainer(mode v1alpha1.InterceptMode) bool {
	return mode == v1alpha1.ModeReplace || mode == v1alpha1.ModeIngest
}

// describe is an Intercept object for people; session tells ours from a colleague's.
func describe(o *v1alpha1.Intercept, session string) localapi.Intercept {
	var taken []control.Port
	for _, p := range o.Status.Ports {
		taken = append(taken, control.Port{Protocol: p.Protocol, Number: uint16(p.ContainerPort)})
	}
	container := ""
	if aboutContainer(o.Spec.Mode) {
		container = o.Status.Container
	}
	preview := ""
	if o.Spec.Preview != nil {
		preview = o.Spec.Preview.ID
	}
	return localapi.Intercept{
		Preview: preview, All: preview != "" && o.Spec.HTTP != nil && o.Spec.HTTP.Rule().IsZero(),
		Container: container, Mode: cmp.Or(strings.ToLower(string(o.Spec.Mode)), localapi.ModeIntercept), Name: o.Spec.Name, Namespace: o.Namespace, Kind: o.Spec.Workload.Kind, Workload: o.Spec.Workload.Name,
		State: cmp.Or(strings.ToUpper(string(o.Status.State)), "PENDING"), Message: o.Status.Message,
		Match: o.Spec.HTTP.Rule(), Ports: ports(o.Spec.Ports, taken), ToPod: toPodWords(o.Spec.ToPod), User: o.Spec.User, Mine: o.Holder() == session,
	}
}

// ports joins the ports that were wanted with those that the manager has found for them, which are in the same order.
func ports(wanted []v1alpha1.WantedPort, taken []control.Port) []localapi.InterceptPort {
	out := make([]localapi.InterceptPort, max(len(wanted), len(taken)))
	for i := range out {
		if i < len(taken) {
			out[i].Port, out[i].Protocol = taken[i].Number, taken[i].Protocol
			out[i].Target = netip.AddrPortFrom(loopback, taken[i].Number).String()
		}
		if i < len(wanted) && wanted[i].Target != "" {
			out[i].Target = wanted[i].Target
		}
	}
	return out
}
