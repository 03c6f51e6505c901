package manager

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/wire"
)

// TestLeases is the state table of a session's life: how long ago it was renewed, created, lost, and the manager started.
func TestLeases(t *testing.T) {
	const never = -1
	for name, tt := range map[string]struct {
		renewed, created, started time.Duration
		lost                      time.Duration
		attached                  bool
		want                      string
	}{
		"attached":                                      {renewed: time.Minute, created: time.Hour, started: time.Hour, lost: never, attached: true},
		"attached, one renewal missed":                  {renewed: 19 * time.Minute, created: time.Hour, started: time.Hour, lost: never, attached: true},
		"attached, two renewals missed":                 {renewed: 21 * time.Minute, created: time.Hour, started: time.Hour, lost: never, attached: true, want: "not renewed"},
		"lost a moment ago":                             {renewed: time.Minute, created: time.Hour, started: time.Hour, lost: time.Second},
		"lost within the grace":                         {renewed: time.Minute, created: time.Hour, started: time.Hour, lost: 29 * time.Second},
		"lost beyond the grace":                         {renewed: time.Minute, created: time.Hour, started: time.Hour, lost: 31 * time.Second, want: "no tunnel"},
		"created a moment ago":                          {created: time.Second, started: time.Hour, lost: never},
		"created, never attached":                       {created: 31 * time.Second, started: time.Hour, lost: never, want: "no tunnel"},
		"from before the manager's start":               {created: time.Hour, started: time.Second, lost: never},
		"from before the manager's start, never back":   {created: time.Hour, started: 31 * time.Second, lost: never, want: "no tunnel"},
		"from before the manager's start, not renewed":  {renewed: 21 * time.Minute, created: time.Hour, started: time.Second, lost: never, want: "not renewed"},
		"lost, then not renewed: the renewal says more": {renewed: 21 * time.Minute, created: time.Hour, started: time.Hour, lost: time.Minute, want: "not renewed"},
	} {
		for _, off := range []time.Duration{0, 3 * time.Hour, -3 * time.Hour} {
			t.Run(fmt.Sprintf("%s, clock off by %v", name, off), func(t *testing.T) {
				w := newWorld(t)
				w.clock = clockOff(off)
				now, stamped := time.Now(), w.clock.now()
				w.started = now.Add(-tt.started)
				s := session("s", "ada", "k")
				s.CreationTimestamp = metav1.NewTime(stamped.Add(-tt.created))
				s.Spec.RenewTime = metav1.NewMicroTime(stamped.Add(-tt.renewed))
				if tt.lost != never {
					w.laptops.lost[s.UID] = lostTunnel{since: now.Add(-tt.lost)}
				}
				if tt.attached {
					w.laptops.tunnels[s.UID] = &mux.Session{}
				}
				if got := w.laptops.over(s); got != tt.want {
					t.Errorf("over: %q, want %q", got, tt.want)
				}
			})
		}
	}
}

// Sessions that are over are deleted, and their tunnels with them; sessions that somebody deleted lose their tunnel.
func TestCheckLeases(t *testing.T) {
	old := session("old", "ada", "k")
	old.Spec.RenewTime = metav1.NewMicroTime(time.Now().Add(-time.Hour))
	old.Spec.Key = ""
	l := newLaptop(t)
	mine := session("mine", "ada", l.id.Fingerprint())
	w := newWorld(t, old, mine)
	s, err := l.attach(w, wire.Hello{Role: wire.RoleLaptop, Session: "mine"})
	if err != nil {
		t.Fatal(err)
	}
	w.until("it is registered", func() bool { return w.laptops.tunnel("mine") != nil })
	w.laptops.lost["ghost"] = lostTunnel{since: time.Now()}
	if err := w.laptops.checkLeases(t.Context()); err != nil {
		t.Fatal(err)
	}
	if w.get(old) {
		t.Error("a session that was not renewed is still there")
	}
	if s.Err() != nil || !w.get(mine) {
		t.Errorf("a session in good order was ended: %v", s.Err())
	}
	if _, ok := w.laptops.lost["ghost"]; ok {
		t.Error("a session that is gone is remembered for ever")
	}
	w.fail = func(verb string, o runtime.Object) error {
		if _, ok := o.(*v1alpha1.SessionList); ok {
			return errors.New("the API server is away")
		}
		return nil
	}
	if err := w.laptops.checkLeases(t.Context()); err == nil || s.Err() != nil {
		t.Errorf("an API server that is away: %v, tunnel %v", err, s.Err())
	}
	w.set(func() { w.fail = nil })
	w.delete(mine) // kubectl delete session
	if _, err := w.laptops.authorize(t.Context(), wire.Hello{Role: wire.RoleLaptop, Session: "mine"}, l.id.Fingerprint()); !errors.Is(err, errRevoked) {
		t.Errorf("a laptop that dials anew at once is told %v", err)
	}
	if err := w.laptops.checkLeases(t.Context()); err != nil {
		t.Fatal(err)
	}
	select {
	case <-s.Done():
	case <-time.After(deadline):
		t.Error("the tunnel of a deleted session is still up")
	}
	if away, ok := errors.AsType[*mux.GoAwayError](s.Err()); !ok || away.Code != wire.CodeGone || away.Msg != control.SessionDeleted {
		t.Errorf("its laptop was told %v", s.Err())
	}
	if _, err := w.laptops.authorize(t.Context(), wire.Hello{Role: wire.RoleLaptop, Session: "mine"}, l.id.Fingerprint()); !errors.Is(err, errRevoked) {
		t.Errorf("and is told when it comes back: %v", err)
	}
	for i := range 2 * maxRevoked {
		w.laptops.revoke(types.UID(fmt.Sprint(i)))
	}
	if n := len(w.laptops.revoked); n != maxRevoked {
		t.Errorf("%d are remembered", n)
	}
}

// A session that was ended here has ended, even if the cache has not heard of it yet.
func TestSessionEndedHere(t *testing.T) {
	l := newLaptop(t)
	s := session("mine", "ada", l.id.Fingerprint())
	w := newWorld(t, s)
	hello := wire.Hello{Role: wire.RoleLaptop, Session: "mine"}
	w.fail = func(verb string, _ runtime.Object) error {
		if verb == "delete" {
			return errors.New("etcd is away")
		}
		return nil
	}
	w.laptops.end(t.Context(), s, "no tunnel")
	if _, err := w.laptops.authorize(t.Context(), hello, l.id.Fingerprint()); err != nil {
		t.Errorf("one that could not be deleted is there: %v", err)
	}
	w.fail = nil
	w.laptops.end(t.Context(), s, "no tunnel")
	again := session("mine", "ada", l.id.Fingerprint())
	if err := w.kc.Create(t.Context(), again); err != nil { // as the cache shows it
		t.Fatal(err)
	}
	if _, err := w.laptops.authorize(t.Context(), hello, l.id.Fingerprint()); !errors.Is(err, errNoSession) {
		t.Errorf("one that was deleted: %v", err)
	}
	deleted := func(ago time.Duration) { // negative: it was not
		w.laptops.mu.Lock()
		defer w.laptops.mu.Unlock()
		if w.laptops.deleted["mine"] = time.Now().Add(-ago); ago < 0 {
			delete(w.laptops.deleted, "mine")
		}
	}
	deleted(-1)
	up, err := l.attach(w, hello) // it was let in a moment before
	if err != nil {
		t.Fatal(err)
	}
	w.until("its tunnel is registered", func() bool { return w.laptops.count() == 1 })
	deleted(0)
	check := func(when string, remembered bool) {
		t.Helper()
		if err := w.laptops.checkLeases(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := w.laptops.endedHere("mine"); got != remembered {
			t.Errorf("%s: remembered: %v", when, got)
		}
	}
	check("in the cache", true)
	select {
	case <-up.Done():
	case <-time.After(deadline):
		t.Fatal("its tunnel goes on")
	}
	w.delete(again)
	w.laptops.lost["mine"] = lostTunnel{since: time.Now()} // it was just coming back
	check("gone from the cache", true)
	if len(w.laptops.known()) != 0 || w.laptops.revoked["mine"] {
		t.Error("it is said that somebody else deleted it")
	}
	deleted(2 * endedFor)
	check("long gone", false)
}

func TestAttach(t *testing.T) {
	l, other := newLaptop(t), newLaptop(t)
	expired := session("expired", "ada", l.id.Fingerprint())
	expired.Spec.RenewTime = metav1.NewMicroTime(time.Now().Add(-time.Hour))
	keyless := session("keyless", "ada", "")
	for name, tt := range map[string]struct {
		hello  wire.Hello
		with   *laptop
		change func(*world)
		want   wire.Code // CodeNone: welcome
	}{
		"welcome":             {hello: wire.Hello{Role: wire.RoleLaptop, Session: "mine"}},
		"another key":         {hello: wire.Hello{Role: wire.RoleLaptop, Session: "mine"}, with: other, want: wire.CodeGone},
		"no key":              {hello: wire.Hello{Role: wire.RoleLaptop, Session: "keyless"}, with: &laptop{nil, t}, want: wire.CodeGone},
		"unknown session":     {hello: wire.Hello{Role: wire.RoleLaptop, Session: "nobody"}, want: wire.CodeGone},
		"no session":          {hello: wire.Hello{Role: wire.RoleLaptop}, want: wire.CodeGone},
		"not renewed":         {hello: wire.Hello{Role: wire.RoleLaptop, Session: "expired"}, want: wire.CodeGone},
		"an agent":            {hello: wire.Hello{Role: wire.RoleAgent, Session: "mine"}, want: wire.CodeDenied},
		"policy not in force": {hello: wire.Hello{Role: wire.RoleLaptop, Session: "mine"}, change: func(w *world) { w.policyErr = nil }, want: wire.CodeDenied},
		"policy not known":    {hello: wire.Hello{Role: wire.RoleLaptop, Session: "mine"}, change: func(w *world) { w.policyErr = errors.New("etcd is away") }, want: wire.CodeBusy},
		"API server away": {hello: wire.Hello{Role: wire.RoleLaptop, Session: "mine"}, change: func(w *world) {
			w.fail = func(verb string, _ runtime.Object) error {
				if verb == "list" {
					return errors.New("etcd is away")
				}
				return nil
			}
		}, want: wire.CodeBusy},
	} {
		t.Run(name, func(t *testing.T) {
			mine := session("mine", "ada", l.id.Fingerprint())
			w := newWorld(t, mine, expired.DeepCopy(), keyless.DeepCopy())
			if tt.change != nil {
				w.set(func() { tt.change(w) })
			}
			with := l
			if tt.with != nil {
				with = tt.with
			}
			s, err := with.attach(w, tt.hello)
			if tt.want != wire.CodeNone {
				var re *mux.RejectError
				if !errors.As(err, &re) || re.Code != tt.want {
					t.Errorf("got %v, want code %s", err, tt.want)
				}
				if re != nil && tt.want == wire.CodeGone && re.Msg != "no such session" {
					t.Errorf("%q tells more than it should", re.Msg)
				}
				if len(w.laptops.known()) != 0 {
					t.Error("registered all the same")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			w.until("the status says so", func() bool {
				return w.get(mine) && mine.Status.State == v1alpha1.SessionConnected && mine.Status.Address == "10.0.0.1:8082"
			})
			_ = s.Close()
			w.until("the status says that it is lost", func() bool {
				return w.get(mine) && mine.Status.State == v1alpha1.SessionLost && mine.Status.Address == ""
			})
			if w.laptops.tunnel("mine") != nil {
				t.Error("the tunnel is still registered")
			}
		})
	}
}

// A laptop that comes back before its loss was noticed takes the place of its old tunnel.
func TestAttachAgain(t *testing.T) {
	l := newLaptop(t)
	w := newWorld(t, session("mine", "ada", l.id.Fingerprint()))
	hello := wire.Hello{Role: wire.RoleLaptop, Session: "mine"}
	first, err := l.attach(w, hello)
	if err != nil {
		t.Fatal(err)
	}
	w.until("it is registered", func() bool { return w.laptops.tunnel("mine") != nil })
	second, err := l.attach(w, hello)
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-first.Done():
	case <-time.After(deadline):
		t.Fatal("the old tunnel is still up")
	}
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()
	if _, err := second.Ping(ctx); err != nil {
		t.Errorf("the new tunnel: %v", err)
	}
	if w.laptops.over(session("mine", "ada", "")) != "" || w.laptops.tunnel("mine") == nil {
		t.Error("the session counts as lost")
	}
}

// What a laptop may ask for: addresses of the cluster, names, watches of its own.
func TestLaptopRequests(t *testing.T) {
	l := newLaptop(t)
	other := intercept("theirs", "eve", "other")
	w := newWorld(t, session("mine", "ada", l.id.Fingerprint()), intercept("web-1", "ada", "mine"), other)
	w.noEcho = errors.New("permission denied")
	s, err := l.attach(w, wire.Hello{Role: wire.RoleLaptop, Session: "mine"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()

	for _, dst := range []string{"127.0.0.1:80", "[::1]:80", "[::ffff:127.0.0.1]:80", "169.254.169.254:80", "[fe80::1]:80", "224.0.0.1:80", "0.0.0.0:80", "[::]:80"} {
		_, err := tunnel.DialTCP(ctx, s, netip.AddrPort{}, netip.MustParseAddrPort(dst))
		var re *mux.RejectError
		if !errors.As(err, &re) || re.Code != wire.CodeUnreachable {
			t.Errorf("dial %s: %v", dst, err)
		}
	}
	var unreachable *mux.RejectError
	if _, err := tunnel.DialEcho(ctx, s, netip.Addr{}, netip.MustParseAddr("169.254.169.254")); !errors.As(err, &unreachable) || unreachable.Code != wire.CodeUnreachable {
		t.Errorf("ping of the metadata service: %v", err)
	}
	if _, err := tunnel.Watch(ctx, s, "laptop/secrets", nil); err == nil {
		t.Error("an unknown watch was accepted")
	}
	if err := tunnel.Control(ctx, s, "anything", nil, nil); err == nil {
		t.Error("a control call was answered")
	}
	if _, err := tunnel.DialIntercept(ctx, s, wire.InterceptHeader{Intercept: "theirs"}); err == nil {
		t.Error("a laptop opened an intercepted flow")
	}

	watch, err := tunnel.Watch(ctx, s, control.LaptopIntercepts, nil)
	if err != nil {
		t.Fatal(err)
	}
	var got control.Intercepts
	if err := watch.Next(ctx, &got); err != nil {
		t.Fatal(err)
	}
	if len(got.Items) != 1 || got.Items[0].UID != "web-1" || got.Items[0].Workload != "web" {
		t.Errorf("told of %+v, want only its own", got.Items)
	}
	in := intercept("web-1", "", "")
	w.get(in)
	in.Status = v1alpha1.InterceptStatus{State: v1alpha1.InterceptActive, Agents: 2, Ports: []v1alpha1.InterceptedPort{{Protocol: "TCP", ContainerPort: 8080}}}
	if err := w.kc.Status().Update(ctx, in); err != nil {
		t.Fatal(err)
	}
	w.notifyIntercepts()
	if err := watch.Next(ctx, &got); err != nil || got.Items[0].State != "Active" || !slices.Equal(got.Items[0].Ports, tcp(8080)) || got.Items[0].Agents != 2 {
		t.Errorf("told of %+v, %v", got.Items, err)
	}
	// Who does not read what is watched keeps it in the manager's memory.
	refused := 0
	for range 100 {
		more, err := tunnel.Watch(ctx, s, control.LaptopIntercepts, nil)
		if err == nil {
			defer more.Close()
			continue
		}
		var re *mux.RejectError
		if refused++; !errors.As(err, &re) || re.Code != wire.CodeBusy {
			t.Errorf("one watch more: %v", err)
		}
	}
	if refused != 100-maxWatches+1 {
		t.Errorf("%d of 100 watches were refused", refused)
	}
	w.set(func() { w.policyErr = nil })
	_ = w.policy.check(ctx)
	if err := watch.Next(ctx, &got); err != nil || len(got.Problems) != 2 || !strings.Contains(got.Problems[0], "not in force") || !strings.Contains(got.Problems[1], "ping") {
		t.Errorf("told of %+v, %v", got, err)
	}
}

// Until an informer has a session, the API server is asked.
func TestSessionByUID(t *testing.T) {
	w := newWorld(t)
	live := newWorld(t, session("fresh", "ada", "k"))
	w.ctrl = fakeCtrl{client: w.kc, live: live.kc}
	for uid, want := range map[types.UID]bool{"fresh": true, "nobody": false, "": false} {
		s, err := w.sessionByUID(t.Context(), uid)
		if err != nil || (s != nil) != want {
			t.Errorf("%q: %v, %v", uid, s, err)
		}
	}
}

func TestMayDial(t *testing.T) {
	for addr, want := range map[string]bool{
		"10.96.0.1": true, "192.168.1.1": true, "8.8.8.8": true, "2001:db8::1": true, "fd00::1": true,
		"127.0.0.53": false, "::1": false, "0.0.0.0": false, "::": false, "169.254.169.254": false, "fe80::1": false, "239.1.1.1": false, "ff02::1": false, "::ffff:169.254.169.254": false,
	} {
		if got := mayDial(netip.AddrPortFrom(netip.MustParseAddr(addr), 80)); got != want {
			t.Errorf("%s: %v", addr, got)
		}
	}
	if mayDial(netip.AddrPort{}) {
		t.Error("no address")
	}
}

// A tunnel that is not one is refused without harm.
func TestAttachOfStranger(t *testing.T) {
	w := newWorld(t)
	a, b := net.Pipe()
	done := make(chan struct{})
	go func() { defer close(done); w.laptops.serve(t.Context(), a) }()
	_ = b.SetDeadline(time.Now().Add(deadline))
	if _, err := b.Write([]byte("GET / HTTP/1.1\r\n")); err != nil && !errors.Is(err, net.ErrClosed) {
		t.Logf("write: %v", err) // the rest may meet a closed pipe
	}
	<-done
	_ = b.Close()
}
