package manager

import (
	"context"
	"errors"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/doppel-dev/doppel/internal/lifecycle"
)

const (
	directService = "traffic-manager-direct"
	// directInterval is how often it is looked where laptops reach this manager directly: a load balancer takes a while.
	directInterval = 10 * time.Second
	// maxDirectNodes bounds the nodes that are named with a NodePort.
	maxDirectNodes = 3
	// maxGreeting bounds the connections that have not shown yet that they are a laptop's: strangers may reach this port.
	maxGreeting = 64
)

// serveDirect answers laptops that do not come through the API server. Whoever gets here has to prove the key of a session, as on every
// other way; only then anything of him is kept.
func (m *Manager) serveDirect(ctx context.Context, l net.Listener) error {
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	greeting := make(chan struct{}, maxGreeting)
	for {
		c, err := lifecycle.Accept(l.Accept)
		if err != nil {
			return err
		}
		select {
		case greeting <- struct{}{}:
		default:
			_ = c.Close()
			continue
		}
		go m.laptops.serveBy(ctx, c, func() { <-greeting })
	}
}

// publishDirect writes into the ConfigMap where laptops reach this manager directly.
func (m *Manager) publishDirect(ctx context.Context) error {
	if m.cfg.DirectAddr == "" {
		return nil
	}
	tick := time.NewTicker(directInterval)
	defer tick.Stop()
	for {
		if err := m.ensureDirect(ctx); err != nil && ctx.Err() == nil {
			m.cfg.Log.Warn("direct addresses not published", "err", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func (m *Manager) ensureDirect(ctx context.Context) error {
	public := m.cfg.DirectPublic
	if public == "" {
		var svc corev1.Service
		if err := m.ctrl.GetAPIReader().Get(ctx, client.ObjectKey{Namespace: m.cfg.Namespace, Name: directService}, &svc); err != nil {
			return err
		}
		var nodes corev1.NodeList
		if svc.Spec.Type == corev1.ServiceTypeNodePort {
			if m.narrow() { // a cache of what it may not read would be waited for
				return errors.New("this traffic-manager is for some namespaces only and may not read nodes: direct.addresses has to say where it is reached")
			}
			if err := m.ctrl.GetClient().List(ctx, &nodes); err != nil {
				return err
			}
		}
		public = strings.Join(directAddresses(&svc, nodes.Items), ",")
	}
	var c corev1.ConfigMap
	if err := m.ctrl.GetAPIReader().Get(ctx, client.ObjectKey{Namespace: m.cfg.Namespace, Name: objectName}, &c); err != nil {
		return err
	}
	if c.Data[configDirect] == public {
		return nil
	}
	if c.Data == nil {
		return errors.New("the ConfigMap is empty") // whoever emptied it restarts us, or nobody connects anyhow
	}
	c.Data[configDirect] = public
	return m.ctrl.GetClient().Update(ctx, &c)
}

// directAddresses are where a Service is reached from outside: at its load balancer, or else at its port of some nodes.
func directAddresses(svc *corev1.Service, nodes []corev1.Node) []string {
	var out []string
	if len(svc.Spec.Ports) == 0 {
		return nil
	}
	port := svc.Spec.Ports[0]
	for _, in := range svc.Status.LoadBalancer.Ingress {
		if host := in.Hostname + in.IP; host != "" {
			out = append(out, net.JoinHostPort(host, strconv.Itoa(int(port.Port))))
		}
	}
	if len(out) > 0 || svc.Spec.Type != corev1.ServiceTypeNodePort || port.NodePort == 0 {
		return out
	}
	for _, kind := range []corev1.NodeAddressType{corev1.NodeExternalIP, corev1.NodeInternalIP} {
		for _, n := range nodes {
			i := slices.IndexFunc(n.Status.Addresses, func(a corev1.NodeAddress) bool { return a.Type == kind })
			if i >= 0 && len(out) < maxDirectNodes {
				out = append(out, net.JoinHostPort(n.Status.Addresses[i].Address, strconv.Itoa(int(port.NodePort))))
			}
		}
		if len(out) > 0 {
			break
		}
	}
	return out
}
